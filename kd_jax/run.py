"""Trains a teacher, students alone and distilled students; tells what distillation gained, and whether it is real."""

import argparse
import contextlib
import datetime
import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_jax import cache, checkpoint, cli, resume
from kd_jax.config import Config, ConfigError, make_config
from kd_jax.data import DataError, Dataset, load
from kd_jax.interrupt import Interrupt

if TYPE_CHECKING:
    from kd_jax import phase

_EPILOG = """\
examples:
  python -m kd_jax.run                                the notebook's experiment on MNIST, 5 seeds
  python -m kd_jax.run --method kd --temperature 4    Hinton's loss, with T squared
  python -m kd_jax.run --dataset idx:FashionMNIST/raw --epochs 10 --out runs/fashion

  python -m kd_jax.run --out runs/fashion --resume    goes on with a run that was stopped, with its own options

exit codes: 0 done, 1 the run failed (a loss that is not finite, say), 2 bad input or options,
130 interrupted (Ctrl-C), 143 terminated (SIGTERM)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Options in, table out."""
    interrupt = Interrupt()
    interrupt.install()
    # What Orbax says where it cannot write, which is told in a sentence.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _make_stdout_patient()
    options = _parser().parse(arguments)
    try:
        config, every = _resolved(options)
        dataset = load(config.dataset)
        _run(config, dataset, options, every, interrupt)
    except BrokenPipeError:
        # Whoever read the output has gone, with `head` for example; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, DataError, checkpoint.MismatchError) as error:
        cli.fail(str(error), code=2)
    except checkpoint.CheckpointError as error:
        cli.fail(str(error), code=1)
    except KeyboardInterrupt as stopped:
        remedy = str(stopped) or "there are no results, so run it again"
        print(f"kd_jax: {interrupt.word}: {remedy}", file=sys.stderr, flush=True)
        # Not sys.exit, which would wait for what is still being compiled.
        os._exit(interrupt.exit_code)


def _make_stdout_patient() -> None:
    """A standard output that is closed, or cannot write ±, is no reason to lose a run."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m kd_jax.run",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli.add_config_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=_folder, metavar="DIR",
        help="folder for results.json, the table, the plots and the parameters (default: a new one under runs/)",
    )  # fmt: skip
    output.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR from its newest good checkpoint"
    )
    output.add_argument(
        "--checkpoint-steps", type=cli.whole, metavar="N",
        help="a checkpoint every N steps of an epoch, and at its end (default: at the end of every epoch)",
    )  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace the results that DIR already holds")
    output.add_argument("--quiet", action="store_true", help="print only the table and the conclusion")
    return parser


def _resolved(options: argparse.Namespace) -> tuple[Config, int | None]:
    """The configuration and the checkpoint steps; with --resume those of the run in the folder."""
    given, every = cli.config_options(options), options.checkpoint_steps
    if every is not None and every < 1:
        raise ConfigError(f"--checkpoint-steps is {every}: it must be at least 1")
    if options.resume and not options.out:
        raise ConfigError("--resume is given without --out: name the folder of the run to go on with")
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite are both given: choose one")
    store = checkpoint.Store(options.out) if options.resume else None
    if store:
        store.require_description()
    return resume.saved_options(store, given, every) if store and store.started else (make_config(**given), every)


def _run(
    config: Config, dataset: Dataset, options: argparse.Namespace, every: int | None, interrupt: Interrupt
) -> None:
    import jax

    from kd_jax import experiment, phase, report

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        cli.fail(f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device ({error}): unset it, or use cpu", code=2)
    if jax.config.values["jax_default_matmul_precision"] is None:
        # Else GPUs and TPUs would round the factors of a product to fewer digits than float32 has.
        jax.config.update("jax_default_matmul_precision", "highest")
    # Everything is float32, whatever the environment says.
    jax.config.update("jax_enable_x64", False)
    cache.keep_compiled_programs()
    experiment.check(config, dataset)
    try:
        folder = options.out or report.new_folder(_folder_name(config))
        made = report.claim(folder) if options.out else True
    except report.OutputError as error:
        cli.fail(str(error), code=2)
    store = checkpoint.Store(folder, warn=lambda sentence: print(f"kd_jax: {sentence}", file=sys.stderr, flush=True))
    with checkpoint.lock(folder):
        try:
            if not _claimed(store, config, dataset, options, every):
                return
            _train(config, dataset, options, phase.Keeping(store, every, interrupt), folder)
        except KeyboardInterrupt:
            failed = store.close()
            kept = f"go on with python -m kd_jax.run --out {shlex.quote(str(folder))} --resume"
            raise KeyboardInterrupt(str(failed or (kept if store.kept else ""))) from None
        finally:
            store.close()
            if not store.kept:
                store.tidy(made)


def _claimed(
    store: checkpoint.Store, config: Config, dataset: Dataset, options: argparse.Namespace, every: int | None
) -> bool:
    """Whether there is anything to do in the folder, which then belongs to this run."""
    from kd_jax import report

    identity = resume.identity(config, dataset, report.environment(), every)
    if options.resume and store.started:
        resume.require_same(store, identity)
        if store.finished and all((store.folder / name).exists() for name in (report.RESULTS, report.TABLE)):
            text = (store.folder / report.TABLE).read_text(encoding="utf-8")
            print(f"{store.folder} is finished.\n\n{text}", flush=True)
            return False
        return True
    if not options.overwrite:
        store.require_description()
    if store.started and not options.overwrite and not store.finished:
        cli.fail(
            f"{store.folder} holds a run that was stopped: add --resume to go on, or --overwrite to start again",
            code=2,
        )
    if (store.folder / report.RESULTS).exists() and not options.overwrite:
        cli.fail(
            f"{store.folder} already holds results: choose another --out, or add --overwrite to replace them", code=2
        )
    store.start(identity)
    return True


def _train(
    config: Config, dataset: Dataset, options: argparse.Namespace, keeping: "phase.Keeping", folder: Path
) -> None:
    import jax

    from kd_jax import experiment, phase, progress, report

    bars = progress.Bars if sys.stdout.isatty() else progress.Lines
    watcher = progress.Silent() if options.quiet else bars()
    try:
        if not options.quiet:
            print(f"{_header(config, dataset, folder)}\nCompiling.", flush=True)
        result = experiment.run(config, dataset, watcher, keeping)
        files = report.write(result, dataset, folder)
        if keeping.store:
            keeping.store.finish()
    except phase.RunError as error:
        if keeping.store:
            # Until what was good is written.
            keeping.store.close()
        kept = ", and start again with --overwrite" if keeping.store and keeping.store.kept else ""
        cli.fail(f"{error}{kept}", code=1)
    except report.OutputError as error:
        cli.fail(str(error), code=1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        cli.fail(
            f"the device gave up ({reason}): use fewer --seeds, a smaller --batch-size or smaller networks", code=1
        )
    text = f"\n{report.table(result)}\n\n{report.conclusion(result)}"
    if not options.quiet:
        text += f"\n\n{result.total_s:.0f} s in all. {folder}/ has {', '.join(files)}."
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        cli.fail(f"the table cannot be printed ({error.strerror}): it is in {folder}/{report.TABLE}, too", code=1)


def _header(config: Config, dataset: Dataset, folder: Path) -> str:
    import jax

    from kd_jax import experiment, report

    teacher = "-".join(map(str, experiment.layer_sizes(config.teacher_hidden, dataset)))
    student = "-".join(map(str, experiment.layer_sizes(config.student_hidden, dataset)))
    environment = report.environment()
    steps = len(dataset.train_labels) // config.batch_size
    last = config.seed + config.seeds - 1
    seeds = f"{config.seeds} seeds ({config.seed} to {last})" if config.seeds > 1 else f"1 seed ({config.seed})"
    epochs = "epochs" if config.epochs > 1 else "epoch"
    of = f", the first of {len(jax.devices())}" if len(jax.devices()) > 1 else ""
    image = " × ".join(map(str, dataset.image_shape))
    lines = {
        "data": f"{dataset.name}, {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images "
        f"of {image}, {dataset.classes} classes",
        "teacher": f"{teacher}, dropout {config.teacher_dropout:g}",
        "students": f"{student}, {seeds}, alone and distilled",
        "method": f"{config.method}, alpha {config.alpha:g}, temperature {config.temperature:g}",
        "training": f"{config.epochs} {epochs} of {steps:,} steps, batch {config.batch_size}, "
        f"Adam {config.learning_rate:g}",
        "device": f"{environment['devices'][0]}{of} ({environment['cpus']} CPUs), jax {environment['packages']['jax']}",
        "results": f"{folder}/",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder: name one, such as runs/mine")
    return Path(text)


def _folder_name(config: Config) -> str:
    source = "".join(c if c.isascii() and c.isalnum() else "-" for c in config.dataset).strip("-")[-40:]
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{source}-{config.preset}-{moment}"


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            # Python would wait for threads first, and those of an Orbax that could not write wait for each other.
            with contextlib.suppress(OSError, AttributeError):
                sys.stdout.flush()
            with contextlib.suppress(OSError, AttributeError):
                sys.stderr.flush()
            os._exit(stopped.code if isinstance(stopped.code, int) else 1)
        raise
