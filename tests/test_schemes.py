"""Students that teach each other, their average, or the next generation."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import DATA, net, teacher
from small import X as INPUTS

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import ConfigError, MethodError
from kd_jax.methods.base import terms_of

pytestmark = pytest.mark.usefixtures("quick_compiling")
HOW: dict[str, Any] = {"optimizer": optax.sgd(0.1), "epochs": 2, "batch_size": 8}


def softmax(z: Any) -> np.ndarray:
    powers = np.exp(np.float64(z))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.slow
def test_members_of_a_cohort_learn_from_labels_and_from_each_other() -> None:
    rng = np.random.default_rng(0)
    each = [jnp.asarray(rng.normal(size=(5, 4)), jnp.float32) for _ in range(3)]
    output = kd.Output(each[0], {f"members.{n}": one for n, one in enumerate(each)})
    batch = kd.Batch(jnp.zeros((5, 1)), jnp.asarray(rng.integers(0, 4, 5), jnp.int32))

    def found(method: kd.Method, output: kd.Output) -> Any:
        return terms_of(method, kd.Parts(), output, None, batch, jnp.int32(0))[0]

    terms = found(kd.DML(3, 2.0, 0.5), output)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    wanted = sum(losses.kd(each[i], each[j], temperature=2.0) for i, j in pairs)
    np.testing.assert_allclose(terms["mutual"], wanted / 2, rtol=1e-5)
    hard = sum(losses.cross_entropy(one, batch.labels) for one in each)
    np.testing.assert_allclose(terms["hard"], 0.5 * hard, rtol=1e-5)
    by = jax.grad(
        lambda z: jnp.sum(found(kd.DML(2, hard=0.0), kd.Output(z, {"members.0": z, "members.1": each[1]}))["mutual"])
    )
    one = jax.grad(lambda z: jnp.sum(losses.kd(z, each[1], temperature=1.0)))
    np.testing.assert_allclose(by(each[0]), one(each[0]), rtol=1e-4, atol=1e-6)
    with pytest.raises(MethodError, match="DML has 1 member"):
        found(kd.DML(1), output)
    for other in (2, 4):
        with pytest.raises(MethodError, match=f"DML has {other} members and the cohort 3: give members=3"):
            found(kd.DML(other), output)
    # In a step the weight is traced.
    without = jax.jit(
        lambda hard: terms_of(kd.DML(3, hard=hard), kd.Parts(), output, None, kd.Batch(None), jnp.int32(0))[0]
    )
    assert set(without(0.0)) == {"mutual"}
    assert kd.DML().of_classes


def test_a_cohort_is_trained_as_one_student() -> None:
    """Its answer is the mean of the probabilities, and each member can be taken out."""
    student = kd.cohort([net(), net(6, 3, 4)])
    result = kd.distill(student, None, DATA, method=kd.DML(), validation=DATA, **HOW)
    assert set(result.history) >= {"hard", "mutual", "validation_accuracy"}
    first, second = kd.members(result.model)
    mean = (softmax(first(INPUTS)) + softmax(second(INPUTS))) / 2
    np.testing.assert_allclose(softmax(result.model(INPUTS)), mean, rtol=1e-5)
    output = result.model(INPUTS, features=("members.1.hidden.0", "members.0"))
    assert output.features["members.1.hidden.0"].shape == (24, 3)
    np.testing.assert_allclose(output.features["members.0"], first(INPUTS), rtol=1e-5, atol=1e-6)
    assert kd.members(student)[0].variables is None


def test_members_who_are_equal_train_as_alone() -> None:
    alone = kd.distill(net().init(3), None, DATA, **HOW)
    same = kd.distill(kd.cohort([net().init(3)] * 2), None, DATA, method=kd.DML(), **HOW)
    for one in kd.members(same.model):
        np.testing.assert_allclose(one(INPUTS), alone.model(INPUTS), rtol=1e-4, atol=1e-5)


def test_what_is_no_cohort_is_told() -> None:
    with pytest.raises(ConfigError, match="a cohort of 1 has nobody"):
        kd.cohort([net()])
    with pytest.raises(ConfigError, match="some models of the cohort have variables"):
        kd.cohort([net(), net().init(0)])
    with pytest.raises(ConfigError, match="is no cohort"):
        kd.members(net())


def test_the_average_of_a_student_is_that_of_its_parameters() -> None:
    """At first plain, then moving; of the parameters before each step."""
    first = kd.with_average(net(6, 4), decay=0.6).init(0)
    data = kd.Batch(INPUTS[:8], DATA.labels[:8])

    def trained(epochs: int) -> kd.Model:
        how: dict[str, Any] = {"optimizer": optax.sgd(0.1), "epochs": epochs, "batch_size": 8}
        return kd.distill(first, None, data, method=kd.self_taught(kd.KD(0.5)), **how).model

    average = jax.tree.map(np.float64, first.variables["params"])
    for step, before in enumerate([first, trained(1), trained(2)], start=1):
        share = min(0.6, 1 - 1 / step)
        params = before.variables["params"]
        average = jax.tree.map(lambda old, new, s=share: s * old + (1 - s) * np.float64(new), average, params)
    model = trained(3)
    found = kd.averaged(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found.network.split(found.variables)[0], average,
    )  # fmt: skip
    output = model(INPUTS, features=("average",))
    np.testing.assert_allclose(output.features["average"], found(INPUTS), rtol=1e-5, atol=1e-6)


def test_a_students_own_average_is_its_teacher() -> None:
    output = kd.Output(jnp.asarray([[1.0, 2.0]]), {"average": jnp.asarray([[0.0, 3.0]])})
    batch = kd.Batch(jnp.zeros((1, 1)))
    found = terms_of(kd.self_taught(kd.KD(0.0)), kd.Parts(), output, None, batch, jnp.int32(0))[0]
    wanted = losses.kd(output.logits, output.features["average"], temperature=4.0)
    np.testing.assert_allclose(found["soft"], wanted, rtol=1e-6)
    assert not kd.self_taught(kd.KD()).needs_teacher
    with pytest.raises(ConfigError, match="FitNet compares features"):
        kd.self_taught(kd.FitNet("a"))
    with pytest.raises(ConfigError, match=r"decay is 1.0: it must be at least 0 and below 1"):
        kd.with_average(net(), decay=1.0)
    with pytest.raises(ConfigError, match="carries no average"):
        kd.averaged(net())


def test_each_generation_teaches_the_next(tmp_path: Path) -> None:
    results = kd.generations(net(), DATA, count=3, method=kd.KD(), checkpoint=tmp_path, **HOW)
    assert ["soft" in result.history for result in results] == [False, True, True]
    again = kd.distill(
        net(), results[0].model, DATA, method=kd.KD(), key=jax.random.fold_in(jax.random.key(0), 1), **HOW
    )
    np.testing.assert_allclose(again.model(INPUTS), results[1].model(INPUTS), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
    together = kd.several([one.model for one in results])
    assert kd.evaluate(results[-1].model, DATA, teacher=together)["agreement"] >= 0
    with pytest.raises(ConfigError, match="each generation starts anew"):
        kd.generations(net().init(0), DATA, count=2, **HOW)
    for count in (0, "2"):
        with pytest.raises(ConfigError, match=f"count is {count!r}: it must be a whole number"):
            inspect.unwrap(kd.generations)(net(), DATA, count=count, **HOW)


def test_assistants_are_taught_from_the_largest_to_the_student() -> None:
    results = kd.assistants([net(6, 6, 4), net(6, 3, 4)], teacher(), DATA, method=kd.KD(), **HOW)
    assert ["soft" in result.history for result in results] == [True, True]
    assert [result.model.network.split(result.model.variables)[0]["hidden"][0]["bias"].shape for result in results] == [
        (6,), (3,),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="there are no students"):
        kd.assistants([], teacher(), DATA, **HOW)


def classified(**changed: Any) -> Any:
    how: dict[str, Any] = {
        "feature": "hidden.0", "teacher_feature": "hidden.0", "kernel": np.zeros((7, 4), np.float32)
    }  # fmt: skip
    return kd.with_classifier(net(), teacher(), changed.pop("inputs", INPUTS), **how | changed)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: inspect.unwrap(kd.assistants)(net(), teacher(), DATA, **HOW), "the students are a Model: give a list"),
        (lambda: kd.cohort(net()), "the members of a cohort are a Model: give a list of models"),
        (lambda: kd.cohort(3), "the members of a cohort are a int: give a list of models"),
        (lambda: inspect.unwrap(kd.several)(teacher()), "the teachers are a Model: give a list of models"),
        (lambda: kd.generations(net(), DATA, count=2, checkpoint=3, **HOW), "checkpoint is 3: give the name of a fold"),
        (lambda: inspect.unwrap(kd.with_average)(net(), decay="x"), "decay is 'x': it must be at least 0 and below 1"),
        (lambda: inspect.unwrap(kd.with_average)(net(), decay=None), "decay is None: it must be at least 0"),
        (lambda: inspect.unwrap(kd.averaged)(3), "a int is no model"),
        (lambda: inspect.unwrap(kd.members)(3), "a int is no model"),
        (lambda: classified(factor=0), "factor is 0: it must be a whole number of at least 1"),
        (lambda: classified(kernel="x"), "the kernel of the classifier is of type <U1: it must hold floating-point"),
        (lambda: classified(kernel=[[1.0], [2.0, 3.0]]), "the kernel of the classifier cannot be read as an array"),
        (lambda: classified(bias="x"), "the bias of the classifier is of type <U1: it must hold floating-point"),
        (lambda: classified(inputs=INPUTS[:, :2]), "the student cannot be called with inputs of float32.24, 2."),
        (
            lambda: kd.distill(kd.cohort([net(6, 5, 3), net(6, 5, 2)]), None, DATA, method=kd.DML(), **HOW),
            r"members of the cohort give logits of \[8, 3\] and of \[8, 2\]: give models with the same classes",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_scheme_is_one_sentence(call: Any, says: str) -> None:
    with pytest.raises((ConfigError, kd.DataError), match=says) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_classifier_may_be_of_pytorch_and_inputs_a_batch_or_lists() -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.nn.Parameter(torch.ones(7, 4, dtype=torch.bfloat16))
    wanted = classified(kernel=np.ones((7, 4)))
    for found in (classified(kernel=kernel), classified(kernel=np.ones((7, 4), int), inputs=DATA)):
        assert found.network == wanted.network
    assert classified(inputs=INPUTS.tolist()).network.space == ()


def test_the_average_of_narrow_parameters_is_kept_wide_and_answers_in_their_type() -> None:
    """From 0 to 1 in 300 steps at a decay of 0.99; in bfloat16 it would stop on the way."""
    student = kd.from_function(lambda params, x: x * params, jnp.zeros((1, 1), jnp.bfloat16))
    model = kd.with_average(student, decay=0.99)
    variables = model.variables | {"params": jnp.ones((1, 1), jnp.bfloat16)}
    variables["state"] = variables["state"] | {"steps": jnp.int32(1000)}
    x = jnp.ones((2, 1), jnp.bfloat16)

    def move(state: Any, _: Any) -> Any:
        output, after = model.network.apply(variables | {"state": state}, x, train=True)
        return after, output.features["average"]

    state, said = jax.lax.scan(move, variables["state"], None, length=300)
    assert state["average"].item() == pytest.approx(1 - 0.99**300, abs=1e-4)
    assert said.dtype == jnp.bfloat16
    last = kd.averaged(kd.Model(model.network, variables | {"state": state}))
    assert last.variables.dtype == jnp.bfloat16
