"""The examples for Ray, on a cluster of two workers on this machine, one of which is killed."""

import concurrent.futures
import json
import pathlib
import socket
import threading
import time

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from tiny_server import write_model

from examples import ray_serve
from examples.ray_batch import MARK, Flags, main
from pdrop_jax.errors import UserError

PICTURE = (pathlib.Path(__file__).parents[1] / "examples/grid.png").read_bytes()
QUESTIONS = {"What is in row 3, column 2?": "bag", "How many bags are there?": "2"}
INTERRUPTED = "Internal Server Error"  # what Ray Serve answers for a replica that has died
MEMORY = 100_000_000  # bytes of each node's object store


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": MEMORY})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def source(tmp_path):
    """Three files of rows; one picture is broken and one is missing."""
    rows = [{"id": n, "question": list(QUESTIONS)[n % 2], "image": {"bytes": PICTURE}} for n in range(24)]
    rows[7]["image"]["bytes"], rows[8]["image"] = b"broken", None
    (tmp_path / "in").mkdir()
    for k in range(3):
        pq.write_table(pa.Table.from_pylist(rows[8 * k : 8 * k + 8]), tmp_path / f"in/{k}.parquet")
    return tmp_path / "in"


def kill_one(name, found):
    """Kills the first process of a Ray actor whose title contains ``name``."""
    for _ in range(600):
        for process in psutil.process_iter(["cmdline"]):
            if name in " ".join(process.info["cmdline"] or []):
                process.kill()
                found.append(process.pid)
                return
        time.sleep(0.1)


def test_every_row_is_answered_though_a_worker_is_killed(cluster, source, tmp_path):
    killed = []
    killer = threading.Thread(target=kill_one, args=("ray::MapWorker", killed), daemon=True)
    killer.start()
    flags = Flags(
        str(source),
        str(tmp_path / "out"),
        prompt_column="question",
        max_new_tokens=8,
        batch_size=4,
        address=cluster.address,
    )
    main(flags)
    killer.join()
    assert len(killed) == 1
    assert (tmp_path / "out" / MARK).exists()
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(24))
    assert [row["answer"] for row in rows] == [
        "" if n in (7, 8) else QUESTIONS[row["question"]] for n, row in enumerate(rows)
    ]
    assert [n for n, row in enumerate(rows) if row["error"]] == [7, 8]
    with pytest.raises(UserError, match="not empty"):
        main(flags)


def test_more_workers_than_cpus_are_refused(cluster, source, tmp_path):
    flags = Flags(str(source), str(tmp_path / "out"), prompt="Hi", workers=3, address=cluster.address)
    with pytest.raises(UserError, match="has 3 CPUs: 3 workers need one each"):
        main(flags)


@pytest.fixture(scope="module")
def url(cluster, tmp_path_factory):
    """Two replicas of a small random model behind Ray Serve."""
    model = write_model(tmp_path_factory.mktemp("ray") / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(address=cluster.address, log_to_driver=False, ignore_reinit_error=True)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    flags = ray_serve.Flags(model=str(model), slots=2, max_new_tokens=8, max_prompt_tokens=64)
    serve.run(ray_serve.application(flags), name="pdrop")
    yield f"http://127.0.0.1:{port}/v1/chat/completions"
    serve.shutdown()


def test_requests_are_answered_or_refused_though_a_replica_is_killed(url):
    question = [{"role": "user", "content": next(iter(QUESTIONS))}]
    request = json.dumps({"model": "tiny", "messages": question, "temperature": 0}).encode()
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slowly():
        """All but the last byte, for which the replica waits."""
        yield request[:-1]
        begun.release()
        go_on.wait(60)
        yield request[-1:]

    def ask(content):
        return httpx.post(url, content=content, headers={"Content-Type": "application/json"}, timeout=60)

    def answer(response):
        return response.json()["choices"][0]["message"]["content"]

    wanted = answer(ask(request))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = []
        for _ in range(4):
            asked.append(pool.submit(ask, slowly()))
            assert begun.acquire(timeout=60)
            time.sleep(0.25)  # a replica has it, and the load balancer gives the next one to the other
        kill_one("ray::ServeReplica", [])
        try:
            assert answer(ask(request)) == wanted  # by the other replica
        finally:
            go_on.set()
        responses = [each.result() for each in asked]
    assert {response.status_code for response in responses} == {200, 500}
    for response in responses:
        assert (answer(response) == wanted) if response.status_code == 200 else (response.text == INTERRUPTED)
