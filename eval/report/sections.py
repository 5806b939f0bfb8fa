"""The sections of the page, each a pure function of the facts."""

from __future__ import annotations

import shlex
from statistics import median

from ..selection import inputs_read
from . import charts
from .charts import Point
from .facts import Artifact, by_block, comparable
from .parts import Figure, Section, Sources, Table, Tile, duration, size
from .speed_section import smallest_batch

_UNIFORM = 0.005  # what varies less is said in words
_MOST_KINDS = 24  # rows of a heat map
_SEARCHED = {
    "sparsity": "Share of the bytes that tokens do not read of a block's linears, before and after the search.",
    "channels": "Of the bytes that are read, the share that goes to inputs; the rest goes to the branch.",
}


def tiles(sources: Sources) -> list[Tile]:
    """The numbers at the top."""
    run, best = sources.artifact.run, smallest_batch(sources.artifact.speed)
    whole = f"{run.effective_bits_model:.2f} in the whole model"
    found = [
        Tile(f"{run.effective_bits:.2f}", "bits per decoder weight", whole),
        Tile(f"{run.dev.compressed:.2f}", "dev perplexity", f"dense {run.dev.dense:.2f}"),
        Tile(size(run.bytes), "on disk"),
    ]
    if best is not None and best.ratio_to_dense is not None:
        against = "" if best.ratio_to_int4 is None else f", {best.ratio_to_int4:.2f}x int4"
        speed = f"{best.ratio_to_dense:.2f}x"
        found.append(Tile(speed, "dense's decoding speed", f"measured at batch {best.batch}{against}"))
    worst = max(run.layers, key=lambda layer: layer.error, default=None)
    if worst is not None:
        found.append(Tile(f"{worst.error:.3f}", "largest layer error", worst.name))
    return found


def headline(sources: Sources) -> Section:
    """The artifact beside those it is compared with."""
    own = sources.artifact
    rows = [["dense", "-", "16.00", "-", f"{own.run.dev.dense:.3f}", "1.000", "-", "-", "-"]]
    for artifact in (own, *sources.others):
        run, best = artifact.run, smallest_batch(artifact.speed)
        rows.append(
            [
                artifact.name,
                run.recipe,
                f"{run.effective_bits:.2f}",
                size(run.bytes),
                f"{run.dev.compressed:.3f}" + ("" if comparable(run, own.run) else " *"),
                f"{run.dev.compressed / run.dev.dense:.3f}",
                "-" if best is None or best.ratio_to_dense is None else f"{best.ratio_to_dense:.2f}x",
                duration(run.seconds),
                f"{run.peak_rss_gb:.2f} GB",
            ]
        )
    headers = ("", "recipe", "bits", "on disk", "dev perplexity", "over dense", "decoding", "time", "peak memory")
    note = [f"Note: {own.run.note}."] if own.run.note else []
    others = [artifact.name for artifact in sources.others if not comparable(artifact.run, own.run)]
    if others:
        note.append(f"* measured on another model or text, so the numbers do not compare: {', '.join(others)}.")
    tables = [Table("", headers, rows, left=2, strong=1)]
    if sources.scored:
        tables.append(_scores(sources))
    return Section("At a glance", note, (), tables)


def _scores(sources: Sources) -> Table:
    selecting = any(score.bits_read is not None for score in sources.scored)
    rows = [
        [
            score.model,
            score.text,
            f"{score.perplexity:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}"),
            str(score.tokens),
            str(score.seqlen),
            *(["-" if score.bits_read is None else f"{score.bits_read:.2f}"] if selecting else []),
        ]
        for score in sources.scored
    ]
    headers = [
        "model",
        "text",
        "perplexity ± standard error",
        "tokens",
        "window",
        *(["bits read"] if selecting else []),
    ]
    return Table("Evaluated", headers, rows, 2)


def quality(sources: Sources) -> Section | None:
    """Perplexity against bits: artifacts on their dev set, and the rivals' comparisons on theirs."""
    own, figures, tables = sources.artifact, [], []
    alike = [own, *(artifact for artifact in sources.others if comparable(artifact.run, own.run))]
    if len(alike) > 1:
        points = [Point(a.run.effective_bits, a.run.dev.compressed, a.run.recipe, 0 if a is own else 1) for a in alike]
        baseline = (own.run.dev.dense, f"dense, {own.run.dev.dense:.2f}")
        svg = charts.scatter(points, "bits per decoder weight", "dev perplexity", baseline)
        figures.append(
            Figure(svg, f"{sources.model}: artifacts on the same dev set; lower and further left is better.")
        )
    for rivals in sources.rivals:
        for model in dict.fromkeys(row.model for row in rivals.rows):
            rows = [row for row in rivals.rows if row.model == model]
            dense = next((row.perplexity for row in rows if row.tool == "dense"), None)
            marked = [row for row in rows if row.tool != "dense"]
            points = [
                Point(row.stored_bits, row.perplexity, row.method, 0 if row.tool == "halfweight" else 2)
                for row in marked
            ]
            if points:
                level = None if dense is None else (dense, f"dense, {dense:.2f}")
                tools = list(dict.fromkeys(row.tool for row in marked if row.tool != "halfweight"))
                named = {0: "halfweight", 2: ", ".join(tools)}
                used = {number: name for number, name in named.items() if any(p.series == number for p in points)}
                svg = charts.scatter(points, "bits stored per decoder weight", "perplexity", level, used)
                figures.append(Figure(svg, f"{model} beside other tools, on one text."))
        cells = [
            [
                row.model,
                row.label,
                f"{row.stored_bits:.2f}",
                f"{row.perplexity:.2f}",
                "-" if row.seconds is None else f"{row.seconds:.0f}",
                "-" if row.peak_gb is None else f"{row.peak_gb:.2f}",
            ]
            for row in rivals.rows
        ]
        headers = ("model", "tool and method", "bits stored", "perplexity", "seconds", "peak GB")
        tables.append(Table("Comparison with other tools", headers, cells, left=2, folded=True))
    return Section("Quality against bits", (), figures, tables) if figures else None


def layers(sources: Sources) -> Section:
    """Where the error is, and what is left of every layer."""
    run, held = sources.artifact.run, sources.artifact.inspection.layers
    kinds, blocks, place = by_block([layer.name for layer in held])
    short = [kind.rpartition(".")[2] for kind in kinds]
    names = short if len(set(short)) == len(short) else kinds
    spots = {layer.name: spot for layer in held if (spot := place(layer.name)) is not None}
    figures, text = [], []
    errors = {spots[layer.name]: layer.error for layer in run.layers if layer.name in spots}
    mapped = len(names) <= _MOST_KINDS
    if not mapped:
        text.append(f"{len(names)} kinds of linears are too many for a map; the tables have them all.")
    if errors and mapped:
        svg = charts.heat_map(names, blocks, errors, "relative output error", log=True)
        figures.append(
            Figure(
                svg,
                "Share of each linear's output energy that compression lost, on held-out inputs; the scale is below.",
            )
        )
    unread = {
        spots[layer.name]: share
        for layer in run.layers
        if layer.name in spots and (share := layer.stats.get("sparsity")) is not None
    }
    if unread and mapped and max(unread.values()) - min(unread.values()) > _UNIFORM:
        svg = charts.heat_map(names, blocks, unread, "share of bytes not read")
        figures.append(Figure(svg, "Budget of each linear: the share of its bytes that a token does not read."))
    if read := inputs_read({layer.name: layer.stats for layer in run.layers}):
        text.append(f"Inputs read, mean over the linears: {read}.")
    density = {spots[layer.name]: layer.density for layer in held if layer.name in spots}
    spread = max(density.values(), default=0.0) - min(density.values(), default=0.0)
    if spread > _UNIFORM and mapped:
        svg = charts.heat_map(names, blocks, density, "share of non-zero weights")
        figures.append(Figure(svg, "Weights left in each linear, counted in the stored tensors."))
    elif density and spread <= _UNIFORM:
        average = sources.artifact.run.effective_bits
        text.append(
            f"Every decoder linear keeps {100 * median(density.values()):.1f} % of its weights, counted in the stored"
            f" tensors, at {average:.2f} bits per weight on average."
        )
    if errors:
        depth = [[error for (_, at), error in errors.items() if at == block] for block in range(blocks)]
        curves = {"worst": [max(found, default=0.0) for found in depth], "median": [median(f or [0.0]) for f in depth]}
        svg = charts.profile(curves, "block", "relative output error")
        figures.append(Figure(svg, "Error by depth: the worst and the median linear of each block."))
    shares, bits_per_block = _weighted_by_block(sources.artifact, spots, blocks)
    for title, values, caption in (
        ("share of non-zero weights", shares, "Sparsity profile: weights left in each block."),
        ("bits per weight", bits_per_block, "Bits stored per weight in each block, scales and metadata included."),
    ):
        if values and max(values) - min(values) > _UNIFORM * max(values):
            figures.append(Figure(charts.profile({title: values}, "block", title), caption))
    by_kind = [
        [
            name,
            (worst := max(found, key=lambda layer: layer.error)).name,
            str(len(found)),
            f"{median(layer.error for layer in found):.4f}",
            f"{worst.error:.4f}",
        ]
        for row, name in enumerate(names)
        if (found := [layer for layer in run.layers if spots.get(layer.name, (-1, 0))[0] == row])
    ]
    bits = {layer.name: layer.bits for layer in held}
    every = [
        [
            layer.name,
            layer.method,
            f"{layer.pattern} {layer.numbers}",
            f"{layer.density:.3f}",
            f"{bits[layer.name]:.2f}" if layer.name in bits else "-",
            f"{layer.error:.5f}",
        ]
        for layer in sorted(run.layers, key=lambda layer: -layer.error)
    ]
    tables = [
        Table("Error by kind", ("linear", "worst in", "count", "median", "worst"), by_kind, 2),
        Table(
            "Every layer, worst first", ("linear", "method", "stored as", "density", "bits", "error"), every, 3, True
        ),
    ]
    return Section("Layers", text, figures, tables)


def search(sources: Sources) -> Section | None:
    """How a search went, where the run had one."""
    steps = sources.artifact.run.search
    if not steps:
        return None
    best = [min(step.objective for step in steps[: i + 1]) for i in range(len(steps))]
    about = sources.artifact.run.searched
    objective = "objective" if about is None else about.settings.objective
    tried = {"tried": [step.objective for step in steps], "best so far": best}
    svg = charts.profile(tried, "step", objective, from_zero=False)
    figures = [Figure(svg, "The objective on the dev set, step by step; lower is better.")]
    text = []
    if about is not None and about.chosen < len(steps):
        given = about.settings
        text.append(
            f"{given.method}, {len(steps)} trials of {given.samples} x {given.seqlen} tokens; all of them read the same"
            f" bytes. Trial {about.chosen} was chosen, trial 0 is the recipe as it was."
        )
        for title, start, chosen in (
            ("sparsity", steps[0].sparsity, steps[about.chosen].sparsity),
            ("channels", steps[0].channels, steps[about.chosen].channels),
        ):
            curves = {"start": _by_block(about.groups, start), "chosen": _by_block(about.groups, chosen)}
            if curves["start"] and curves["chosen"] and start != chosen:
                figures.append(Figure(charts.profile(curves, "block", title), _SEARCHED[title]))
    rows = [[str(i), f"{step.objective:.5g}", step.detail] for i, step in enumerate(steps)]
    return Section(
        "Search",
        text,
        figures,
        [Table("", ("step", "objective", "tried"), rows, 0, True)],
    )


def _by_block(groups: list[list[int]], values: list[float]) -> list[float]:
    """The group's value for every block, in order; none when the file does not say them all."""
    if len(groups) != len(values):
        return []
    return [value for blocks, value in zip(groups, values, strict=True) for _ in blocks]


def calibration(sources: Sources) -> Section:
    """What the run calibrated and measured itself on."""
    run = sources.artifact.run
    rows = [
        ["text", run.calibration_data],
        ["tokens", str(run.calibration_tokens)],
        ["seed of the windows", str(run.seed)],
        ["SHA-256 of the windows", run.windows_sha256],
        [
            "dev set",
            f"{run.dev.windows} windows of {run.dev.seqlen} from the last tenth; {run.dev.tokens} tokens scored",
        ],
        ["computed in", f"{run.dtype} on {run.device}"],
    ]
    return Section("Calibration", (), (), [Table("", ("", ""), rows, left=2)])


def provenance(sources: Sources) -> list[Section]:
    """The recipe, versions, hashes and commands."""
    artifact, run = sources.artifact, sources.artifact.run
    checks = run.verification
    rows = [
        ["model", run.model],
        ["folder", artifact.folder],
        *([f"{name}", number] for name, number in run.versions.items()),
        ["reloaded outputs differ by", f"{checks.relative_difference:.1e} (allowed {checks.tolerance:.0e})"],
        ["time, peak memory", f"{duration(run.seconds)}, {run.peak_rss_gb:.2f} GB"],
    ]
    hashes = [[name, digest] for name, digest in artifact.sha256.items()]
    flags = f"--calibration {shlex.quote(run.calibration_data)} --seed {run.seed}"
    commands = [
        f"halfweight compress {shlex.quote(run.model)} --recipe recipe.yaml {flags} --out {shlex.quote(artifact.name)}",
        *([sources.command] if sources.command else []),
    ]
    tables = [Table("", ("", ""), rows, left=2)]
    if hashes:
        tables.append(Table("SHA-256", ("file", "hash"), hashes, left=2))
    return [
        Section("Recipe", ["As it ran, defaults written out."], code=artifact.recipe),
        Section("Provenance", (), (), tables),
        Section("Commands", code="\n".join(commands)),
    ]


def _weighted_by_block(
    artifact: Artifact, spots: dict[str, tuple[int, int]], blocks: int
) -> tuple[list[float], list[float]]:
    """Non-zero share and stored bits per weight of every block."""
    weights, kept, bits = ([0.0] * blocks for _ in range(3))
    for layer in artifact.inspection.layers:
        if layer.name in spots:
            block, count = spots[layer.name][1], layer.shape[0] * layer.shape[1]
            weights[block] += count
            kept[block] += layer.density * count
            bits[block] += layer.bits * count
    shares = [[part / max(1.0, whole) for part, whole in zip(parts, weights, strict=True)] for parts in (kept, bits)]
    return shares[0], shares[1]
