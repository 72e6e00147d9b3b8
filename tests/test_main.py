import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kd_jax import __main__ as main


def test_kd_jax_alone_names_its_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kd_jax"])
    main.main()
    text = capsys.readouterr().out
    for name in ("run", "sweep", "reproduce", "export"):
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


@pytest.mark.parametrize("command", ["run", "sweep", "reproduce", "export"])
def test_no_command_answers_ctrl_c_with_a_traceback_while_it_imports(command: str, tmp_path: Path) -> None:
    """A `jax` that takes its time stands for the real one."""
    (tmp_path / "jax.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    # A shell that runs the tests in the background has its children ignore Ctrl-C, from birth.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {str(tmp_path)!r}); runpy.run_module('kd_jax.{command}', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert error == ""
    assert process.returncode == -signal.SIGINT
