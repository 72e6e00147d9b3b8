import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import assert_close, assert_is_oracle

from kd_jax.losses import contrastive

EXAMPLES, DIM, BATCH, NEGATIVES = 11, 3, 4, 5
INDICES = np.array([7, 0, 10, 3])
ROWS = np.concatenate([INDICES[:, None], np.random.default_rng(3).integers(0, EXAMPLES, (BATCH, NEGATIVES))], axis=1)


def arrays() -> tuple[np.ndarray, ...]:
    """Embeddings of length 1 of student and teacher, and a bank."""
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(2, BATCH, DIM))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return (*embeddings, *rng.uniform(-1, 1, (2, EXAMPLES, DIM)))


def bank_of(student: np.ndarray, teacher: np.ndarray, z: tuple[float, float] = (0.0, 0.0)) -> contrastive.CRDBank:
    return contrastive.CRDBank(*map(jnp.asarray, (student, teacher, np.float64(z[0]), np.float64(z[1]))))


def crd(student, teacher, bank, **numbers):
    return contrastive.crd(student, teacher, bank, jnp.asarray(INDICES), jnp.asarray(ROWS[:, 1:]), **numbers)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_values_and_normalisers_are_the_oracles(temperature: float) -> None:
    student, teacher, of_student, of_teacher = arrays()
    expected, constants = oracles.crd(*oracles.long(*arrays()), ROWS, temperature)
    with jax.enable_x64(True):
        values, bank = crd(
            jnp.asarray(student), jnp.asarray(teacher), bank_of(of_student, of_teacher), temperature=temperature
        )
        assert_close(values, expected, rtol=1e-13)
        assert_close([bank.student_normaliser, bank.teacher_normaliser], constants, rtol=1e-13)
        np.testing.assert_array_equal(bank.student, of_student)
        # The first batch's constants stay.
        again, kept = crd(jnp.asarray(teacher), jnp.asarray(student), bank, temperature=temperature)
        assert float(kept.student_normaliser) == float(bank.student_normaliser)
        assert float(kept.teacher_normaliser) == float(bank.teacher_normaliser)
        fresh, _ = crd(
            jnp.asarray(teacher), jnp.asarray(student), bank_of(of_student, of_teacher), temperature=temperature
        )
        assert np.abs(again - fresh).max() > 1e-3


def test_gradients_take_the_normalisers_as_constants() -> None:
    student, teacher, of_student, of_teacher = arrays()
    _, constants = oracles.crd(*oracles.long(*arrays()), ROWS, 0.5)

    def with_constants(s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """The oracle of lengths that are not 1, with the constants of the first batch."""
        s, t = (np.array([oracles.direction(x) for x in batch]) for batch in (s, t))
        values = np.zeros(BATCH, dtype=oracles.Long)
        noise = oracles.Long(NEGATIVES) / EXAMPLES
        for batch, bank, z in ((s, of_teacher, constants[0]), (t, of_student, constants[1])):
            for i, row in enumerate(ROWS):
                p = [np.exp(oracles.dot(batch[i], bank[r].astype(oracles.Long)) * 2) / z for r in row]
                values[i] -= np.log(p[0]) - np.log(p[0] + noise + oracles.Long(1e-7))
                values[i] -= sum(np.log(noise) - np.log(x + noise + oracles.Long(1e-7)) for x in p[1:])
        return values

    def loss(s, t):
        return crd(s, t, bank_of(of_student, of_teacher), temperature=0.5)[0]

    assert_is_oracle(loss, with_constants, student, teacher, gradients=1e-10)


def test_the_bank_takes_no_gradient() -> None:
    student, teacher, of_student, of_teacher = (jnp.asarray(array, jnp.float32) for array in arrays())
    bank = contrastive.CRDBank(of_student, of_teacher, jnp.zeros(()), jnp.zeros(()))
    for gradient in jax.grad(lambda b: crd(student, teacher, b)[0].sum())(bank):
        np.testing.assert_array_equal(gradient, 0)


def test_an_example_of_weight_0_is_absent_from_values_normalisers_and_bank() -> None:
    student, teacher, of_student, of_teacher = arrays()
    weights, here = np.array([1.0, 0, 1, 1]), [0, 2, 3]
    student[1], teacher[1] = np.nan, 1e30
    few = [array[here] for array in (student, teacher)]
    expected, constants = oracles.crd(*oracles.long(*few, of_student, of_teacher), ROWS[here], 0.2)
    with jax.enable_x64(True):
        bank, given = bank_of(of_student, of_teacher), [jnp.asarray(student), jnp.asarray(teacher)]

        def mixed(s, t):
            values, updated = crd(s, t, bank, temperature=0.2, weights=jnp.asarray(weights))
            return values.sum(), (values, updated)

        (_, (values, updated)), gradients = jax.value_and_grad(mixed, (0, 1), has_aux=True)(*given)
        moved = contrastive.crd_update(updated, jnp.asarray(INDICES), *given, weights=jnp.asarray(weights))
    assert_close(np.asarray(values)[here], expected, rtol=1e-13)
    assert_close([updated.student_normaliser, updated.teacher_normaliser], constants, rtol=1e-13)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(np.asarray(gradient)[1], 0)
    np.testing.assert_array_equal(moved.student[0], of_student[0])
    np.testing.assert_array_equal(moved.teacher[0], of_teacher[0])


def test_no_example_at_all() -> None:
    student, teacher, of_student, of_teacher = (jnp.asarray(array, jnp.float32) for array in arrays())
    bank = contrastive.CRDBank(of_student, of_teacher, jnp.zeros(()), jnp.zeros(()))
    values, updated = crd(student, teacher, bank, weights=jnp.zeros(BATCH))
    np.testing.assert_array_equal(values, 0)
    # The next batch still sets them.
    assert float(updated.student_normaliser) == float(updated.teacher_normaliser) == 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_bank_moves_its_own_rows(momentum: float) -> None:
    student, teacher, of_student, of_teacher = arrays()
    with jax.enable_x64(True):
        found = contrastive.crd_update(
            bank_of(of_student, of_teacher, (3.0, 4.0)), jnp.asarray(INDICES), 2 * student, teacher, momentum=momentum
        )
    expected_student, expected_teacher = of_student.copy(), of_teacher.copy()
    for row, s, t in zip(INDICES, student, teacher, strict=True):
        expected_student[row] = oracles.crd_row(of_student[row], s, momentum)
        expected_teacher[row] = oracles.crd_row(of_teacher[row], t, momentum)
    assert_close(found.student, expected_student, rtol=1e-14)
    assert_close(found.teacher, expected_teacher, rtol=1e-14)
    assert (float(found.student_normaliser), float(found.teacher_normaliser)) == (3.0, 4.0)


def test_a_row_outside_the_bank_gives_nan_and_moves_nothing() -> None:
    student, teacher, of_student, of_teacher = (jnp.asarray(array, jnp.float32) for array in arrays())
    bank = contrastive.CRDBank(of_student, of_teacher, jnp.ones(()), jnp.ones(()))
    indices, negatives = jnp.asarray([7, -1, EXAMPLES, 3]), jnp.asarray(ROWS[:, 1:]).at[3, 2].set(-1)
    values, _ = contrastive.crd(student, teacher, bank, indices, negatives)
    np.testing.assert_array_equal(np.isnan(values), [False, True, True, True])
    found = contrastive.crd_update(bank, indices, student, teacher)
    changed = np.any(np.asarray(found.student != of_student), axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [3, 7])


def test_negatives_are_all_but_ones_own_and_evenly_drawn() -> None:
    drawn = contrastive.crd_negatives(jax.random.key(0), jnp.asarray([0, 3, 6]), examples=7, negatives=6000)
    assert drawn.shape == (3, 6000)
    for own, row in zip((0, 3, 6), drawn, strict=True):
        counts = np.bincount(row, minlength=7)
        assert counts[own] == 0
        # Five standard deviations.
        np.testing.assert_allclose(np.delete(counts, own), 1000, atol=5 * np.sqrt(1000))


def test_negatives_of_other_classes_are_evenly_drawn() -> None:
    labels = np.array([2, 0, 1, 0, 2, 2, 0, 1, 2])
    classes = contrastive.class_order(jnp.asarray(labels))
    indices = np.array([1, 2, 8])
    drawn = contrastive.crd_negatives_of_other_classes(jax.random.key(1), jnp.asarray(indices), classes, negatives=6000)
    for own, row in zip(indices, drawn, strict=True):
        counts, others = np.bincount(row, minlength=9), labels != labels[own]
        np.testing.assert_array_equal(counts[~others], 0)
        expected = 6000 / others.sum()
        np.testing.assert_allclose(counts[others], expected, atol=5 * np.sqrt(expected))


def test_one_class_alone_has_no_negatives() -> None:
    classes = contrastive.class_order(jnp.zeros(EXAMPLES, int))
    drawn = contrastive.crd_negatives_of_other_classes(jax.random.key(1), jnp.asarray(INDICES), classes, negatives=2)
    np.testing.assert_array_equal(drawn, -1)
    with pytest.raises(ValueError, match="a bank of 1 example has no negatives: give at least 2"):
        contrastive.crd_negatives(jax.random.key(0), jnp.asarray([0]), examples=1, negatives=2)


def test_a_new_bank() -> None:
    bank = contrastive.crd_bank(jax.random.key(0), 1000, dim=12)
    for memory in bank[:2]:
        assert memory.shape == (1000, 12)
        assert 0.495 < float(jnp.abs(memory).max()) <= 0.5
        assert abs(float(memory.mean())) < 0.02
    assert np.any(bank.student != bank.teacher)
    assert float(bank.student_normaliser) == float(bank.teacher_normaliser) == 0


def test_vmap_jit_and_bfloat16() -> None:
    pairs = [
        [jnp.asarray(array, jnp.float32) for array in arrays()],
        [jnp.asarray(a[::-1], jnp.float32) for a in arrays()],
    ]

    def values(s, t, of_s, of_t):
        return crd(s, t, contrastive.CRDBank(of_s, of_t, jnp.zeros(()), jnp.zeros(())))[0]

    found = jax.jit(jax.vmap(values))(*map(jnp.stack, zip(*pairs, strict=True)))
    assert_close(found, np.stack([values(*pair) for pair in pairs]), rtol=1e-6)
    narrow = [array.astype(jnp.bfloat16) for array in pairs[0][:2]]
    wide = [array.astype(jnp.float32) for array in narrow]
    assert values(*narrow, *pairs[0][2:]).dtype == jnp.float32
    np.testing.assert_array_equal(values(*narrow, *pairs[0][2:]), values(*wide, *pairs[0][2:]))


def test_shapes_are_checked() -> None:
    student, teacher, of_student, of_teacher = (jnp.asarray(array, jnp.float32) for array in arrays())
    bank = contrastive.CRDBank(of_student[:, :2], of_teacher[:, :2], jnp.zeros(()), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"embeddings \[4, 3\] do not fit a bank \[11, 2\]: give \[batch, dim\]"):
        crd(student, teacher, bank)


def test_narrow_indices_name_every_row() -> None:
    indices = jnp.array([1, 2], jnp.int8)
    negatives = contrastive.crd_negatives(jax.random.key(0), indices, examples=1000, negatives=2000)
    assert 127 < negatives.max() < 1000
    order = contrastive.class_order(jnp.arange(1000, dtype=jnp.int32) // 500)
    others = contrastive.crd_negatives_of_other_classes(jax.random.key(0), indices, order, negatives=2000)
    assert others.min() >= 500
    bank = contrastive.crd_bank(jax.random.key(1), 1000, 3)
    embeddings = jnp.ones((2, 3))
    values, _ = contrastive.crd(embeddings, embeddings, bank, indices, negatives)
    assert jnp.isfinite(values).all()
    moved = contrastive.crd_update(bank, indices, embeddings, embeddings, weights=jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(jnp.any(moved.student != bank.student, axis=-1).nonzero()[0], [1])
