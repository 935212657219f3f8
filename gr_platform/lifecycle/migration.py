"""State made by an earlier release, brought to what this one reads: `gr migrate`.

Invariant: a migration may be run again at any moment: it looks at what there is and does only what is missing, so one
that was killed is finished by the next. The layout in `state.json` is written when all of them are done.
"""

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.errors import UserError

# What state.json names; a folder without that file is older than it: 0.
LAYOUT = 1
STATE = "state.json"
# A restore keeps here what it has read, until it is all in place.
RESTORING = ".restoring"


def layout(home: Path) -> int:
    """Return the version of a state folder's layout. Raises UserError if its state.json is damaged."""
    try:
        return int(storage.read_object(home / STATE)["layout"])
    except FileNotFoundError:
        return 0
    except (ValueError, TypeError, KeyError):
        raise UserError(f"$GR_HOME/{STATE} is damaged; delete it and run gr migrate") from None


def require_readable(home: Path) -> None:
    """Raise UserError if a newer release made the state folder, or a restore into it was stopped half-way."""
    if (found := layout(home)) > LAYOUT:
        raise UserError(
            f"the state folder was made by a newer release (layout {found}, this one reads {LAYOUT}); use that one, or "
            "restore a backup that was taken before it"
        )
    if (home / RESTORING).is_dir():
        raise UserError("a restore into this state folder was stopped half-way; run the same gr restore again")


def begin(home: Path) -> None:
    """Say of a state folder in which nothing was made yet that it has this release's layout."""
    if not (home / STATE).exists() and not any((home / name).exists() for name in ("landing", "runs", "sequences")):
        _write(home)


def migrate(home: Path) -> Iterator[str]:
    """Bring a state folder to this release's layout, saying what is done. Raises UserError as `require_readable`."""
    require_readable(home)
    before = layout(home)
    with storage.exclusive(home, "stages"):
        for made_for, step in MIGRATIONS:
            if before < made_for:
                yield from step(home)
        _write(home)
    yield f"the state folder has layout {LAYOUT}" + (", as before" if before == LAYOUT else f", before: {before}")


def _write(home: Path) -> None:
    fields = {"layout": LAYOUT, "release": version("gr-platform")}
    storage.write_text(home / STATE, json.dumps(fields, indent=1) + "\n")


def _date_runs(home: Path) -> Iterator[str]:
    """Let each run say until when it learned, which its sequences tell: it can then be judged on a later window."""
    dated, lost = 0, []
    for ds in sorted(path.name for path in (home / "runs").glob("*/")):
        undated = [run for run in _results(home / "runs" / ds, "*_model-*") if "trained_until_ms" not in run[1].facts]
        sequences = {m.digest: folder for folder, m in _results(home / "sequences" / ds, "sequences-*")}
        for folder, manifest in undated:
            if (made_of := sequences.get(manifest.spec.get("sequences", ""))) is None:
                lost.append(folder.name)
                continue
            storage.add_facts(folder, {"trained_until_ms": _trained_until(made_of, folder)})
            dated += 1
    if dated:
        yield f"runs that now say until when they learned: {dated}"
    if lost:
        yield f"runs whose sequences are gone, so that they cannot be judged beside a new one: {', '.join(lost)}"


def _trained_until(sequences: Path, run: Path) -> int:
    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.sequences.splits import newest_time
    from gr_platform.training.loop import trained_ends

    dataset = SequenceDataset.open(sequences)
    return newest_time(dataset, trained_ends(run, dataset.num_users))


def _export_again(home: Path) -> Iterator[str]:
    """Export bundles of an earlier format again from their runs: without it no rollback to them is possible."""
    from gr_platform.bundle.load import EXPORT_VERSION

    again = 0
    for ds in sorted(path.name for path in (home / "bundles").glob("*/")):
        parent = home / "bundles" / ds
        runs = {m.digest: folder for folder, m in _results(home / "runs" / ds, "*_model-*")}
        bundles = list(_results(parent, "*-*"))
        current = {m.spec.get("run") for _, m in bundles if m.facts.get("export_version") == EXPORT_VERSION}
        for folder, manifest in bundles:
            old = manifest.facts.get("export_version") != EXPORT_VERSION
            if old and manifest.spec.get("run") in runs and manifest.spec["run"] not in current:
                try:
                    made = _export(folder, manifest, runs[manifest.spec["run"]])
                except UserError as error:
                    yield f"{folder.name} cannot be exported again ({error}); train its model again to serve it"
                    continue
                again += 1
            elif old and (found := _of_run(bundles, manifest.spec.get("run"))) is not None:
                made = found
            else:
                continue
            pointer = parent / f"{manifest.kind}.current"
            if pointer.exists() and pointer.read_text(encoding="utf-8").strip() == folder.name:
                storage.point(parent, manifest.kind, made)
    if again:
        yield f"bundles exported again: {again}; let them serve with gr promote"


def _of_run(bundles: "list[tuple[Path, storage.Manifest]]", run: Any) -> Path | None:
    from gr_platform.bundle.load import EXPORT_VERSION

    found = [f for f, m in bundles if m.spec.get("run") == run and m.facts.get("export_version") == EXPORT_VERSION]
    return found[0] if found else None


def _export(folder: Path, manifest: storage.Manifest, run_folder: Path) -> Path:
    from gr_platform.bundle.export import write_bundle
    from gr_platform.bundle.load import EXPORT_VERSION
    from gr_platform.sequences.vocabulary import Vocabulary
    from gr_platform.training.load import load_model

    run = storage.read_manifest(run_folder)

    def build(target: Path) -> dict[str, Any]:
        facts = write_bundle(
            target,
            model=load_model(run_folder),
            weights=run_folder / "model.safetensors",
            vocabulary=folder / "vocabulary.parquet",
            num_rows=Vocabulary.load(folder / "vocabulary.parquet").num_rows,
            declaration=manifest.facts["declaration"],
            recipe=manifest.facts["recipe"],
            metrics=manifest.facts["metrics"],
        )
        return facts | {"trained_until_ms": run.facts.get("trained_until_ms"), "split": run.spec.get("split")}

    spec = manifest.spec | {"export_version": EXPORT_VERSION}
    return storage.ensure(folder.parent, manifest.kind, spec, build).folder


def _results(parent: Path, pattern: str) -> Iterator[tuple[Path, storage.Manifest]]:
    """Yield the finished results of a folder; what is damaged or unfinished is left as it is."""
    for folder in sorted(parent.glob(pattern)):
        try:
            yield folder, storage.read_manifest(folder)
        except UserError:
            continue


# The layout that each belongs to, in order.
MIGRATIONS: tuple[tuple[int, Callable[[Path], Iterator[str]]], ...] = ((1, _date_runs), (1, _export_again))
