"""What every command does around its work: signals, errors in one sentence, exit codes, a folder of its own, JAX."""

import argparse
import contextlib
import datetime
import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kd_jax.errors import CheckpointError, ConfigError, DataError, MismatchError, OutputError, RunError
from kd_jax.experiments.shell import folder as folders
from kd_jax.experiments.shell import options as cli
from kd_jax.experiments.shell import progress, resume
from kd_jax.experiments.shell.folder import RESULTS, TABLE
from kd_jax.experiments.shell.signals import Interrupt
from kd_jax.experiments.shell.text import say
from kd_jax.experiments.shell.wording import in_options
from kd_jax.files import cache
from kd_jax.train import checkpoint

CHECKPOINT_PAUSE = 10.0
"""Seconds from one checkpoint to the next, at least, where the user has not said how many steps there are between."""

EXIT_CODES = """\
exit codes: 0 done, 1 the run failed (a loss that is not finite, say), 2 bad input or options,
130 interrupted (Ctrl-C), 143 terminated (SIGTERM)
"""


def parser(prog: str, description: str | None, examples: str, more: str = "") -> cli.Parser:
    """A parser without options. examples: lines below them, each indented by two. more: another part below."""
    return cli.Parser(
        prog=prog,
        description=description,
        epilog="\n".join(filter(None, (f"examples:\n{examples}", more, EXIT_CODES))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_command(
    parser: cli.Parser, arguments: Sequence[str] | None, body: Callable[[argparse.Namespace, Interrupt], None]
) -> None:
    """Calls `body` with the parsed arguments, and ends the program as `EXIT_CODES` says."""
    interrupt = Interrupt()
    interrupt.install()
    # What Orbax says where it cannot write, which is told in a sentence.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _make_stdout_patient()
    options = parser.parse(arguments)
    try:
        body(options, interrupt)
    except BrokenPipeError:
        # Whoever read the output has gone, with `head` for example; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ConfigError, DataError, MismatchError) as error:
        cli.fail(in_options(error), code=2)
    except CheckpointError as error:
        cli.fail(in_options(error), code=1)
    except KeyboardInterrupt as stopped:
        remedy = str(stopped) or "there are no results, so run it again"
        print(f"kd_jax: {interrupt.word}: {remedy}", file=sys.stderr, flush=True)
        # Not sys.exit, which would wait for what is still being compiled.
        os._exit(interrupt.exit_code)


def as_program(main: Callable[[], None]) -> None:
    """Calls `main`, and ends a program that failed at once.

    Python would wait for threads first, and those of an Orbax that could not write wait for each other.
    """
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, AttributeError):
                    stream.flush()
            os._exit(stopped.code if isinstance(stopped.code, int) else 1)
        raise


def add_output_options(parser: argparse.ArgumentParser, what: str) -> Any:
    """`--out`, `--resume`, `--overwrite` and `--quiet`; returns their group. what: the files in the folder."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=_folder, metavar="DIR", help=f"folder for {what} (default: a new one under runs/)"
    )
    output.add_argument(
        "--resume", action="store_true", help="go on with what was stopped in DIR, if it holds anything"
    )
    output.add_argument("--overwrite", action="store_true", help="replace the results that DIR already holds")
    output.add_argument("--quiet", action="store_true", help="print only the table and the conclusion")
    return output


def check_output_options(options: argparse.Namespace) -> checkpoint.Store | None:
    """The store to go on with, where `--resume` is given. Raises `ConfigError` and as `Store.require_description`."""
    if options.resume and not options.out:
        raise ConfigError("--resume is given without --out: name the folder of the run to go on with")
    if options.resume and options.overwrite:
        raise ConfigError("--resume and --overwrite are both given: choose one")
    if not options.resume:
        return None
    store = checkpoint.Store(options.out)
    store.require_description()
    return store if store.started else None


def prepare_jax() -> None:
    """The same arithmetic everywhere, and compiled programs that are kept. Fails where JAX finds no device."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = f" ({error})" if str(error) else ""
        cli.fail(f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device{reason}: unset it, or use cpu", code=2)
    if jax.config.values["jax_disable_jit"]:
        cli.fail("JAX_DISABLE_JIT is set, and trainings are compiled programs: unset it", code=2)
    if jax.config.values["jax_default_matmul_precision"] is None:
        # Else GPUs and TPUs would round the factors of a product to fewer digits than float32 has.
        jax.config.update("jax_default_matmul_precision", "highest")
    # Everything is float32, whatever the environment says.
    jax.config.update("jax_enable_x64", False)
    cache.keep_compiled_programs()


@contextlib.contextmanager
def opened(options: argparse.Namespace, name: str, prog: str) -> Iterator[checkpoint.Store]:
    """The folder `--out`, or a new `runs/NAME-date`, for this process alone, and emptied where nothing came of it.

    An interrupt is raised again with the command that goes on.
    """
    try:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = options.out or folders.new_folder(f"{name}-{moment}")
        made = folders.claim(folder) if options.out else True
    except OutputError as error:
        cli.fail(str(error), code=2)
    store = checkpoint.Store(folder, warn=lambda sentence: print(f"kd_jax: {sentence}", file=sys.stderr, flush=True))
    with checkpoint.lock(folder):
        try:
            yield store
        except KeyboardInterrupt:
            failed = store.close()
            kept = f"go on with {prog} --out {shlex.quote(str(folder))} --resume"
            raise KeyboardInterrupt(in_options(failed) if failed else kept if store.kept else "") from None
        finally:
            store.close()
            if store.empty:
                store.tidy(made)


def checkpoint_policy(
    store: checkpoint.Store, interrupt: Interrupt, every: int | None = None
) -> checkpoint.CheckpointPolicy:
    """How a command keeps what it has done. every: the checkpoint steps that the user asked for."""
    pause = 0.0 if every else CHECKPOINT_PAUSE
    return checkpoint.CheckpointPolicy(store, every, pause, lambda: interrupt.requested, interrupt)


def claimed(store: checkpoint.Store, identity: Mapping[str, Any], options: argparse.Namespace) -> bool:
    """Whether there is anything to do in the folder, which then belongs to this run.

    identity: what makes it this run.
    """
    if options.resume and store.started:
        resume.require_same(store, identity)
        if store.finished and all((store.folder / name).exists() for name in (RESULTS, TABLE)):
            text = (store.folder / TABLE).read_text(encoding="utf-8")
            say(f"{store.folder} is finished.\n\n{text}")
            return False
        return True
    if not options.overwrite:
        store.require_description()
    if store.started and not options.overwrite and not store.finished:
        cli.fail(
            f"{store.folder} holds a run that was stopped: add --resume to go on, or --overwrite to start again",
            code=2,
        )
    if (store.folder / RESULTS).exists() and not options.overwrite:
        cli.fail(
            f"{store.folder} already holds results: choose another --out, or add --overwrite to replace them", code=2
        )
    if options.resume:
        started = f"{store.folder} holds nothing to go on with: it is started."
        # Quiet or not: who resumes may have named another folder than was meant.
        print(f"kd_jax: {started}", file=sys.stderr, flush=True) if options.quiet else say(started)
    options.resume = False
    store.start(identity, overwrite=options.overwrite)
    return True


@runtime_checkable
class Parts(Protocol):
    """What a run keeps as it goes."""

    @property
    def kept(self) -> bool:
        """Whether there are any."""

    def discard(self) -> None:
        """Removes them. Raises `OSError`."""


def claimed_with_parts(
    store: checkpoint.Store, identity: Mapping[str, Any], options: argparse.Namespace, parts: Parts,
    *, name: str, complete: Callable[[], bool],
) -> bool:  # fmt: skip
    """`claimed`, of a run that keeps its parts: more may be added to a finished one, whose parts stay.

    name: of the parts. complete: whether all that are asked for are there. Raises `ConfigError`.
    """
    if options.resume and store.started:
        if store.finished and not complete():
            resume.require_same(store, identity)
            return True
        return claimed(store, identity, options)
    if parts.kept and not store.started and not options.overwrite:
        raise ConfigError(
            f"{store.folder} already holds {name}: choose another --out, or add --overwrite to replace them"
        )
    whole = claimed(store, identity, options)
    try:
        parts.discard()
    except OSError as error:
        cli.fail(
            f"the older {name} in {store.folder} cannot be removed ({error.strerror}): choose another --out", code=2
        )
    return whole


def watcher(options: argparse.Namespace) -> progress.Progress:
    """Who tells how far the trainings are: a bar on a terminal, lines elsewhere, nobody if the command is quiet."""
    if options.quiet:
        return progress.Silent()
    return progress.Bars() if sys.stdout.isatty() else progress.Lines()


def since(options: argparse.Namespace) -> str:
    """What the time is of that a process tells at its end."""
    return "since it was resumed" if options.resume else "in all"


@contextlib.contextmanager
def telling_failures(store: checkpoint.Store) -> Iterator[None]:
    """What training and writing may raise, as one sentence with exit code 1."""
    import jax

    try:
        yield
    except RunError as error:
        # Until what was good is written.
        store.close()
        kept = ", and start again with --overwrite" if store.kept else ""
        cli.fail(f"{in_options(error)}{kept}", code=1)
    except OutputError as error:
        cli.fail(str(error), code=1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        cli.fail(
            f"the device gave up ({reason}): use fewer --seeds, a smaller --batch-size or smaller networks", code=1
        )


def carry_out(
    store: checkpoint.Store, options: argparse.Namespace, header: Callable[[], str], work: Callable[[], tuple[str, str]]
) -> None:
    """Says what will be done, does it, and prints the result.

    work: trains and writes; returns the result as text, and what is said below it unless the command is quiet.
    """
    with telling_failures(store):
        if not options.quiet:
            say(header())
        text, closing = work()
        store.finish()
    _say(f"\n{text}" + ("" if options.quiet else f"\n\n{closing}"), store.folder / TABLE)


def _say(text: str, path: Path) -> None:
    """Prints the result. path: where it can be read too, should that fail."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        cli.fail(f"the table cannot be printed ({error.strerror}): it is in {path}, too", code=1)


def as_name(source: str) -> str:
    """A data set's source as a part of a folder's name."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in source).strip("-")[-40:]


def _make_stdout_patient() -> None:
    """A standard output that is closed, or cannot write ±, is no reason to lose a run."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder: name one, such as runs/mine")
    return Path(text)
