import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other's cores take several times as long
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

sys.path.insert(0, os.path.dirname(__file__))


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        return  # its workers run the tests; this process starts them sooner without torch
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are tested on the CPU; read when triton is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_collection_finish():
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_patch_lang"):
        from interpreted_kernels import once_a_kernel

        interpreter._patch_lang = once_a_kernel(interpreter._patch_lang)
    gc.freeze()  # what was imported stays: 600,000 objects that no collection need look at again


def pytest_unconfigure():
    gc.unfreeze()  # libraries count at exit what was not freed


@pytest.fixture
def remembered_proofs(request):
    """Tiny models do not repeat a self-test that passed: for tests of what comes after it.

    A test that replaces code, and every test where PROVE_ALL is set, as `make test-all` does, has each model proved.
    """
    if os.environ.get("PROVE_ALL") or "monkeypatch" in request.fixturenames:
        yield
        return
    from remembered_proofs import remembered

    from hfblend.support.registry import TestedModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TestedModel, "_self_test", remembered(TestedModel._self_test))
        yield


@pytest.fixture
def word_tokenizer():
    """A tokenizer of whole words, see `helpers.make_word_tokenizer`."""
    from helpers import make_word_tokenizer

    return make_word_tokenizer()


@pytest.fixture(scope="session")
def s3_server():
    """The address of an object store of moto's on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """fsspec's filesystem of an S3 with an empty bucket, found through the environment."""
    fsspec = pytest.importorskip("fsspec")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"ACCESS_KEY_ID": "dummy", "SECRET_ACCESS_KEY": "dummy", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": s3_server, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.clear_instance_cache()
    filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)
    filesystem.clear_instance_cache()
