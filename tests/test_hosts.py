"""`torchrun` itself: on one machine, and on two "hosts", network namespaces that a cable connects."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfweight import Recipe, compress_checkpoint
from halfweight.compress.report import CompressionReport
from runs import BLOCKS, contents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")

HOSTS = ("halfweight-a", "halfweight-b")


def torchrun(*arguments: Any, host: str | None = None, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    inside = [] if host is None else ["ip", "netns", "exec", host]
    command = [*inside, sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd="/")


def finished(run: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = run.communicate(timeout=240)
    return run.returncode, err


def worker_of(run: subprocess.Popen[str], rank: int) -> int:
    """The process id of the worker `rank` that `torchrun` started."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = status.read_bytes().split(b"\0")
            parent = int((status.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == run.pid and f"RANK={rank}".encode() in variables:
            return int(status.parent.name)
    raise AssertionError(f"no worker {rank}")


def wait_for(file: Path, run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not file.exists():
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("llama", num_hidden_layers=BLOCKS, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def recipe_file(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "gptq.yaml"
    calibration = {"data": str(text_file), "samples": 4, "seqlen": 1024}
    file.write_text(
        Recipe.parse(
            {"name": "gptq", "calibration": calibration, "stages": [{"pass": "gptq", "group_size": 32}]}
        ).to_yaml()
    )
    return file


@pytest.fixture(scope="module")
def single(model: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "out"
    compress_checkpoint(model, Recipe.load(recipe_file), out, dtype="float32")
    return out


@pytest.mark.slow
def test_torchrun_names_the_dead_and_the_same_command_resumes(
    model: Path, recipe_file: Path, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["--standalone", "--nproc-per-node", 2, "-m", "halfweight", "compress", model]
    command += ["--recipe", recipe_file, "--out", out, "--dtype", "float32", "--json", tmp_path / "report.json"]
    run = torchrun(*command)
    wait_for(out.with_name("out.partial") / "block-00001.safetensors", run)
    pid = worker_of(run, 1)
    os.kill(pid, signal.SIGKILL)
    code, err = finished(run)
    assert code != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "rank 1 (" in line and f":{pid}) died while " in line and "start the same command again" in line
    assert not out.exists()
    code, err = finished(torchrun(*command))
    assert code == 0, err
    report = CompressionReport.model_validate_json((tmp_path / "report.json").read_text())
    assert report.blocks_resumed >= 1
    assert report.windows_by_process == [2, 2]
    assert contents(out) == contents(single)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, that know nothing but each other."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root, and ip")
    here, there = HOSTS
    try:
        for host in HOSTS:
            if subprocess.run(["ip", "netns", "add", host], capture_output=True, check=False).returncode:
                pytest.skip("may not make network namespaces")
        ends = ["ip", "link", "add", "hw-a", "netns", here, "type", "veth", "peer", "name", "hw-b", "netns", there]
        subprocess.run(ends, check=True)
        for number, (host, end) in enumerate(zip(HOSTS, ("hw-a", "hw-b"), strict=True), 1):
            for words in (f"addr add 10.77.0.{number}/24 dev {end}", f"link set {end} up", "link set lo up"):
                subprocess.run(["ip", "-n", host, *words.split()], check=True)
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_compress_one_model_and_notice_a_cut_cable(
    cable: None, model: Path, recipe_file: Path, single: Path, tmp_path: Path
) -> None:
    def start(out: Path) -> list[subprocess.Popen[str]]:
        return [
            torchrun(
                *("--nnodes", 2, "--node-rank", number, "--nproc-per-node", 1, "--master-addr", "10.77.0.1"),
                *("--master-port", 29501, "-m", "halfweight", "compress", model, "--recipe", recipe_file),
                *("--out", out, "--dtype", "float32"),
                host=host,
                GLOO_SOCKET_IFNAME=f"hw-{'ab'[number]}",
                HALFWEIGHT_PEER_SECONDS="5",
            )
            for number, host in enumerate(HOSTS)
        ]

    runs = start(tmp_path / "cut")
    wait_for(tmp_path / "cut.partial" / "block-00000.safetensors", runs[0])
    subprocess.run(["ip", "-n", HOSTS[0], "link", "set", "hw-a", "down"], check=True)
    begin = time.monotonic()
    (code, err), (other, said) = map(finished, runs)
    assert code != 0 and other != 0
    assert time.monotonic() - begin < 120
    assert "rank 1 (" in err and "has not been heard of for 5 s while " in err
    assert "rank 0 (" in said and "has not been heard of for 5 s while " in said
    assert not (tmp_path / "cut").exists()

    subprocess.run(["ip", "-n", HOSTS[0], "link", "set", "hw-a", "up"], check=True)
    for code, err in map(finished, start(tmp_path / "cut")):
        assert code == 0, err
    report = CompressionReport.model_validate_json((tmp_path / "cut" / "report.json").read_text())
    assert report.windows_by_process == [2, 2]
    assert report.blocks_resumed >= 1
    assert contents(tmp_path / "cut") == contents(single)
