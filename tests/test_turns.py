"""Threads and processes that use one pipeline at once."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_zimage import GenerateRequest, RequestError, Step, ZImagePipeline
from mlx_zimage.models.transformer import Transformer

pytestmark = pytest.mark.usefixtures("light_pocket")

REQUEST = GenerateRequest("a red circle", 32, 32, seed=1, steps=2)
OTHER = GenerateRequest("a blue square", 32, 32, seed=2, steps=1)


@pytest.fixture
def pocket() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained("pocket", dtype="float32")


def pixels(events) -> np.ndarray:
    *_, image = events
    return image.pixels


def test_a_second_thread_is_refused_while_the_first_generates(pocket, monkeypatch):
    expected = pixels(pocket.stream(REQUEST))
    inside, leave = threading.Event(), threading.Event()
    finish = Transformer.finish

    def waiting(*args):
        inside.set()
        assert leave.wait(30)
        return finish(*args)

    monkeypatch.setattr(Transformer, "finish", waiting)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: pixels(pocket.stream(REQUEST)))
        assert inside.wait(30)
        try:
            with pytest.raises(RequestError, match="another thread is generating with this pipeline; put a threading"):
                pool.submit(pocket, "a blue square").result(30)
        finally:
            leave.set()
        assert np.array_equal(first.result(30), expected)
    assert pixels(pocket.stream(OTHER)).shape == (32, 32, 3), "and then it is free again"


def test_a_thread_is_also_refused_between_the_events_of_another(pocket):
    events = pocket.stream(REQUEST)
    next(events)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RequestError, match="another thread is generating"):
        pool.submit(list, pocket.stream(OTHER)).result(30)
    assert np.array_equal(pixels(events), pixels(ZImagePipeline.from_pretrained("pocket", "float32").stream(REQUEST)))


def test_each_of_many_threads_gets_its_own_image_or_an_error(pocket):
    expected = {i: pixels(pocket.stream(GenerateRequest("a red circle", 16, 16, seed=i, steps=1))) for i in range(6)}
    together = threading.Barrier(6)

    def generate(i: int) -> np.ndarray | None:
        together.wait(30)
        try:
            return pixels(pocket.stream(GenerateRequest("a red circle", 16, 16, seed=i, steps=1)))
        except RequestError:
            return None

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(generate, range(6), timeout=60))
    done = [i for i, image in enumerate(found) if image is not None]
    assert done
    assert all(np.array_equal(found[i], expected[i]) for i in done)


def test_a_stream_left_open_is_closed_when_the_next_starts(pocket):
    """As in a notebook, where the traceback of a failed cell keeps its loop alive."""
    open_one = pocket.stream(REQUEST)
    next(open_one)
    assert pixels(pocket.stream(OTHER)).shape == (32, 32, 3)
    with pytest.raises(RequestError, match="a later request on this pipeline has ended this one"):
        next(open_one)
    assert pixels(pocket.stream(REQUEST)).shape == (32, 32, 3)


def test_a_stream_left_open_by_a_thread_that_has_ended_keeps_no_other_out(pocket):
    open_one = pocket.stream(REQUEST)
    thread = threading.Thread(target=next, args=(open_one,))
    thread.start()
    thread.join(60)
    assert pixels(pocket.stream(OTHER)).shape == (32, 32, 3)
    with pytest.raises(RequestError, match="a later request on this pipeline has ended this one"):
        next(open_one)


def test_latents_can_be_decoded_within_a_loop_over_steps(pocket):
    previews = []
    for event in pocket.stream(REQUEST):
        if isinstance(event, Step):
            previews.append(pocket.decode(event.clean[0]))
    assert np.array_equal(previews[-1], event.pixels)
    assert np.array_equal(pocket.decode(np.zeros((4, 4, 16))), pocket.decode(mx.zeros((4, 4, 16)))), "NumPy's, too"


def test_a_stream_takes_a_request_and_not_a_prompt(pocket):
    with pytest.raises(
        RequestError, match="expected a GenerateRequest but got str; to pass a prompt, call the pipeline itself"
    ):
        next(pocket.stream("a red circle"))


def test_without_keep_all_networks_are_unloaded():
    pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32", keep=False)
    pixels(pipe.stream(OTHER))
    gc.collect()
    before = mx.get_active_memory()
    latents = mx.zeros((4, 4, 16))
    for use in (lambda: pipe.decode(latents), lambda: pipe.encode_image(np.zeros((32, 32, 3), np.float32))):
        use()
        assert mx.get_active_memory() - before < 10_000  # the latents; the decoder takes 2.8 MB
    embeddings = pipe.encode("a green star")
    assert mx.get_active_memory() - before < 10_000 + 2 * embeddings.nbytes  # the encoder takes 1.3 MB


FORKED = """
import os
from mlx_zimage import ZImagePipeline, ZImageError
pipe = ZImagePipeline.from_pretrained("pocket", dtype="float32")
pipe("a red circle", width=16, height=16, num_inference_steps=1, seed=1)
def use():
    pipe("a red circle", width=16, height=16, num_inference_steps=1, seed=1)
for use in (use, lambda: pipe.encode("a"), lambda: ZImagePipeline.from_pretrained("pocket")):
    child = os.fork()
    if not child:
        try:
            use()
        except ZImageError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_gets_an_error_instead_of_hanging():
    found = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=100, check=True)
    lines = found.stdout.splitlines()
    assert len(lines) == 3
    assert all("was forked from one that uses MLX" in line and "get_context('spawn')" in line for line in lines)
