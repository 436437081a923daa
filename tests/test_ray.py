"""The examples for Ray, on a cluster of two workers on this machine, one of which is killed."""

import pathlib
import threading
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from examples.ray_batch import MARK, Flags, main
from pdrop_jax.errors import UserError

PICTURE = (pathlib.Path(__file__).parents[1] / "examples/grid.png").read_bytes()
QUESTIONS = {"What is in row 3, column 2?": "bag", "How many bags are there?": "2"}
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
