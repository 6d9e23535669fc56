"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks.staged
from benchmarks._harness import alone, hushed, show, versions
from benchmarks.staged import figures
from benchmarks.staged.contenders import CONTENDERS, KEYS, missing
from benchmarks.staged.figures import Result
from benchmarks.staged.fit import fit
from benchmarks.staged.settings import LAYERS, PADDINGS, Settings, read


def measure(settings: Settings, keys: Sequence[str], path: Path | None = None) -> Result:
    """Fit all contenders in turns, once for each seed and repeat, and keep each round."""
    settings = dataclasses.replace(settings, threads=settings.threads or torch.get_num_threads())
    with hushed():  # a process with threads can't be forked
        data = read(settings)
        result = Result(settings, str(data))
        for contender in CONTENDERS:
            if contender.key not in keys:
                continue
            if missing(contender):
                result.left_out.append(f"{contender.name}: left out, it isn't installed.")
                continue
            result.fits[contender.key] = []
        here = list(result.fits)
        rounds = settings.seeds * settings.repeats
        for number in range(rounds):
            # another one begins each time: drift of the machine favours none
            turn = number % max(1, len(here))
            for key in here[turn:] + here[:turn]:
                done = alone(fit, key, settings, data, number % settings.seeds)
                result.fits[key].append(done)
                told = f"round {number + 1} of {rounds}, {key}: {done.seconds:.1f} s, "
                print(f"{told}{100 * done.accuracy:.1f} %", file=sys.stderr, flush=True)
            if path is not None:
                told = {"rows": figures.rows(result), "sentences": figures.sentences(result)}
                content = {**dataclasses.asdict(result), **told, "versions": versions()}
                path.write_text(json.dumps(content, indent=1, default=str))
    return result


def title(result: Result) -> str:
    settings = result.settings
    model = "MiniLM-L6" if settings.folder() else f"random BERT {LAYERS} x {settings.width}"
    return (
        f"{model}, {result.data}, {settings.epochs} epochs, batch {settings.batch}, padding "
        f"{settings.padding}, AdamW {settings.lr:g}, {settings.threads} threads, "
        f"{settings.seeds * settings.repeats} rounds with {settings.seeds} seeds"
    )


def _freezing(text: str) -> tuple[tuple[int, int], ...]:
    """`2:4,4:5` -> ((2, 4), (4, 5))."""
    try:
        found = tuple(
            (int(epoch), int(layers)) for epoch, layers in (p.split(":") for p in text.split(","))
        )
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} isn't such as 2:4,4:5") from None
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))
    if not rising or found[0][1] < 1 or found[-1][1] > LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} must rise, with 1 to {LAYERS} layers")
    return found


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.staged",
        description=str(benchmarks.staged.__doc__).split("\n")[0],
    )
    texts = {
        "samples": "texts to train with",
        "epochs_per_stage": "epochs of each of the three stages",
        "seeds": "seeds: of the head's weights, the order and dropout; one round for each",
        "repeats": "rounds for each seed",
        "batch": "texts a step",
        "max_length": "tokens of a text at most",
        "width": "hidden size, without the weights",
        "heads": "attention heads, without the weights",
        "vocabulary": "of the model, without the weights",
        "lr": "of AdamW",
        "percentile": "of AutoFreeze's rule; a higher one freezes sooner",
    }
    for name, text in texts.items():
        default = getattr(Settings, name)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help=f"{text} ({default})")
    parser.add_argument("--threads", type=int, help="of torch in a fit (torch's own choice)")
    parser.add_argument("--trec", type=Path, help="folder or training file of TREC's questions")
    parser.add_argument("--random", dest="weights", action="store_false", help="random weights")
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        default=Settings.padding,
        help="fixed: all to the longest text (default); batch: to the longest of each batch; "
        "bucket: the same, with texts of like length in batches that stay together",
    )
    parser.add_argument(
        "--freeze",
        type=_freezing,
        default=Settings.freeze,
        help="EPOCH:LAYERS,...: from which epoch on GradualFreeze has how many layers frozen, from "
        "the bottom (2:4,4:5)",
    )
    shown = parser.add_argument_group("which, and how it is shown")
    shown.add_argument("--only", nargs="+", choices=KEYS, default=KEYS, help="some contenders")
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    shown.add_argument("--json", type=Path, help="write everything to this file, after each round")
    given = parser.parse_args(arguments)
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{key: value for key, value in vars(given).items() if key in names})
    if settings.freeze[-1][0] >= settings.epochs and "freeze" in given.only:
        parser.error(f"--freeze: there are {settings.epochs} epochs, 0 to {settings.epochs - 1}")
    return settings, given


def main(arguments: Sequence[str] | None = None) -> Result:
    settings, given = parse(arguments)
    result = measure(settings, given.only, given.json)
    told = [*figures.notes(result), *figures.sentences(result), versions()]
    show(title(result), figures.HEADS, figures.rows(result), told, markdown=given.markdown)
    return result


if __name__ == "__main__":
    main()
