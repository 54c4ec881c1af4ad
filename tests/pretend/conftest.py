"""Run each test of this folder in another process, in which the pretend device is registered."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from packaging.version import Version

from tests.helpers.pretend_runs import start

POOL = pytest.StashKey[ProcessPoolExecutor]()


@pytest.fixture(scope="session", autouse=True)
def process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start the process."""
    if Version(torch.__version__).release < (2, 13):
        pytest.skip("before torch 2.13, the tensors of a device in Python cannot be sliced in inference mode")
    with ProcessPoolExecutor(1, get_context("spawn"), start) as pool:
        request.config.stash[POOL] = pool
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Call the test there, with its fixtures, which are plain values. An error is raised here with its traceback."""
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    pyfuncitem.config.stash[POOL].submit(pyfuncitem.obj, **arguments).result()
    return True
