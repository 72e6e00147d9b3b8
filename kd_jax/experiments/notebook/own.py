"""Networks for the commands by name: the zoo's, or a user's own, `package.module:name` or `file.py:name`."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from kd_jax.errors import ConfigError
from kd_jax.models import Model, Network, as_model, from_linen, from_nnx, zoo


@cache
def load(what: str, option: str, image_shape: tuple[int, ...], classes: int) -> Model:
    """The model that `what` names. option: which one it is for, in errors.

    A name of the zoo, `resnet20`, makes a new network of so many classes for each seed. So does a class of
    `nnx.Module`s, or a function whose one argument is `rngs`. A function without arguments is called: what it returns,
    a module or a `kd.Model`, has its values already. So has a module that lives. A Linen module is called with images
    of `image_shape`. Raises `ConfigError`.
    """
    if what in zoo.__all__:
        make = getattr(zoo, what)
        return from_nnx(lambda rngs: make(num_classes=classes, in_channels=image_shape[-1], rngs=rngs))
    place, colon, name = what.rpartition(":")
    if not colon:
        nearest = difflib.get_close_matches(what, zoo.__all__, 3, 0.4) or zoo.__all__
        raise ConfigError(
            f"{option} is {what!r}, which no network is called: the nearest are {', '.join(nearest)}, and one of your "
            "own is package.module:name or file.py:name"
        )
    if not place or not name.isidentifier():
        raise ConfigError(f"{option} is {what!r}: name a network as package.module:name or as file.py:name")
    module = _module(place, option)
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(f"{option} is {what!r}: {place} has no {name}, and has {', '.join(names[:10])}")
    try:
        return _as_model(getattr(module, name), image_shape)
    except ConfigError as error:
        raise ConfigError(f"{option} is {what!r}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{option} is {what!r}: making it failed ({type(error).__name__}: {reason}): mend it"
        ) from error


def units(model: Model, image_shape: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """How many numbers an image makes in each place of a model, for an estimate of the memory: too many, rather.

    Raises `ConfigError` where the network does not take such images, or gives another number of classes.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    network = model.network
    variables = jax.eval_shape(network.init, jax.random.key(0)) if model.variables is None else model.variables
    try:
        logits = jax.eval_shape(
            lambda v, x: network.apply(v, x, train=False, key=jax.random.key(0))[0], variables, images
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        shown = " × ".join(map(str, image_shape))
        raise ConfigError(f"the network cannot be called with images of {shown} ({reason}): change it") from error
    if logits.logits.shape != (1, classes):
        raise ConfigError(
            f"the network gives outputs of the shape {logits.logits.shape[1:]} for an image, and the data set has "
            f"{classes} classes: it must give a logit for each"
        )
    features = network.feature_shapes(variables, images)
    sizes = [int(leaf.size) for leaf in jax.tree.leaves(features)]
    return (int(jnp.prod(jnp.array(image_shape))), *sizes, classes)


def _module(place: str, option: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        except Exception as error:
            raise ConfigError(f"{option}: {place} cannot be imported ({error}): name a module that can") from error
        finally:
            sys.path.remove("")
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"{option}: there is no file {place}: name a Python file, as file.py:name")
    name = f"_kd_jax_own_{abs(hash(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{option}: {place} cannot be run ({type(error).__name__}: {reason}): mend it") from error
    return module


def _as_model(found: Any, image_shape: tuple[int, ...]) -> Model:
    takes_nothing = callable(found) and not isinstance(found, type | Model | Network | nnx.Module | nn.Module)
    if takes_nothing and not _required(found):
        found = found()
    if isinstance(found, nn.Module):
        return from_linen(found, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return as_model(found)


def _required(function: Any) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]
