"""Certification of very many images on Ray Data while a worker is killed: speed, and check for lost or repeated rows.

CIFAR-10's files are served, again and again until there are as many images as asked for, by moto's S3 on the loopback
(or read from a folder with --here). The same images then go through the local engine, and all rows are compared.

python benchmarks/many_images.py --data data/cifar10 --images 100000 --out results/speed/many_images.json
"""

import argparse
import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bagcert.bulk.results import read_rows
from bagcert.bulk.run import certify_many
from bagcert.evaluation.evaluate import versions
from bagcert.io.files import write_atomically


def main() -> None:
    """Ray with a kill, local without; the JSON holds both and what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--patch", default="5")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part-size", type=int, default=1000)
    parser.add_argument("--here", action="store_true", help="read from a folder, not from S3")
    parser.add_argument("--out", type=Path, default=Path("results/speed/many_images.json"))
    arguments = parser.parse_args()
    asked = {"model": arguments.model, "patches": [arguments.patch], "part_size": arguments.part_size}
    asked |= {"limit": arguments.images}
    killed: list[float] = []
    load = psutil.getloadavg()
    with (
        tempfile.TemporaryDirectory() as name,
        served(arguments.data, arguments.images, Path(name), arguments.here) as data,
    ):

        def kill(done: int, total: int) -> None:
            """Kills the worker of the first finished part with SIGKILL when a third is done."""
            if not killed and done >= total / 3:
                rows = next(iter(read_rows(Path(name) / "ray", ["worker"])))
                os.kill(int(rows["worker"][0].as_py().rpartition(":")[2]), signal.SIGKILL)
                killed.append(done / total)

        ray = certify_many(data, Path(name) / "ray", engine="ray", workers=arguments.workers, on_progress=kill, **asked)
        local = certify_many(data, Path(name) / "local", **asked)
        rows = pa.concat_tables(read_rows(Path(name) / "ray"))
        same = rows.drop_columns("worker").equals(
            pa.concat_tables(read_rows(Path(name) / "local")).drop_columns("worker")
        )
    numbers = rows["number"].to_pylist()
    result = {
        "command": f"python benchmarks/many_images.py --model {arguments.model} --data {arguments.data} --images "
        f"{arguments.images} --patch {arguments.patch} --workers {arguments.workers} --part-size {arguments.part_size}"
        + (" --here" if arguments.here else ""),
        "model": ray["model"],
        "weights_sha256": ray["weights_sha256"],
        "patch": arguments.patch,
        "source": "folder" if arguments.here else "S3 (moto, loopback)",
        "images": arguments.images,
        "workers_killed": len(killed),
        "killed_after_share": killed,
        "workers_seen": len(set(rows["worker"].to_pylist())),
        "lost": arguments.images - len(set(numbers)),
        "doubled": len(numbers) - len(set(numbers)),
        "errors": ray["errors"],
        "rows_equal_to_local": same,
        "certified": ray["results"][0]["certified"],
        "ray": {"workers": arguments.workers, **{name: ray[name] for name in ("seconds", "images_per_second")}},
        "local": {name: local[name] for name in ("seconds", "images_per_second")},
        "cores": os.cpu_count(),
        "load_average_before": [round(value, 2) for value in load],
        "versions": versions(),
    }
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result, indent=2))
    if result["lost"] or result["doubled"] or not same or not killed:
        raise SystemExit("images were lost or doubled, rows differ, or no worker was killed")


@contextmanager
def served(data: Path, images: int, folder: Path, here: bool) -> Iterator[str]:
    """The name of a source with at least so many images: copies of all Parquet files of `data`."""
    files = sorted(data.glob("*.parquet"))
    names: list[tuple[Path, str]] = []
    count = 0
    while count < images:
        for file in files:
            names.append((file, f"{len(names):04}-{file.name}"))
            count += pq.read_metadata(file).num_rows
    if here:
        (folder / "data").mkdir()
        for file, name in names:
            os.symlink(file.resolve(), folder / "data" / name)
        yield str(folder / "data")
        return
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
        store = s3fs.S3FileSystem()
        store.mkdir("images")
        for file, name in names:
            store.put(str(file), f"images/{name}")
        yield "s3://images"
    finally:
        server.stop()


if __name__ == "__main__":
    main()
