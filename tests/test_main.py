import subprocess
import sys

import pytest

from kd_jax import __main__ as main


def test_kd_jax_alone_names_its_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kd_jax"])
    main.main()
    text = capsys.readouterr().out
    for name in ("run", "sweep", "reproduce"):
        assert f"python -m kd_jax.{name}" in text


def test_what_is_no_command_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kd_jax", "run", "--seeds", "3"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("kd_jax: 'run --seeds 3' is no command: use python -m kd_jax.run")
    assert error.count("\n") == 1


def test_no_command_answers_ctrl_c_with_a_traceback_while_it_imports() -> None:
    """Only a command of ours: where kd_jax is imported by others, Ctrl-C is theirs."""
    program = """
import importlib, signal, sys
handlers = []
for arguments in ("-m kd_jax.run", "-m kd_jax.sweep", "-m kd_jax.reproduce", "kd_jax.run", "-m x"):
    sys.orig_argv = ["python", *arguments.split()]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.reload(sys.modules["kd_jax"]) if "kd_jax" in sys.modules else importlib.import_module("kd_jax")
    handlers.append(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)
print(handlers)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[True, True, True, False, False]\n"
