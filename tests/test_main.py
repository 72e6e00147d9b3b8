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
