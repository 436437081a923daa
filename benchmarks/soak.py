"""A server under clients that vanish, cancel, send garbage and huge pictures, beside clients that ask properly.

Afterwards no request is left in the server, every slot still answers, each proper request got the answer that the
first one got, and the server's memory has stopped growing.

    python -m benchmarks.soak --seconds 1200
"""

import asyncio
import base64
import dataclasses
import io
import json
import pathlib
import random
import statistics
import time
import zlib
from typing import Any

import httpx
import tyro
from PIL import Image

from benchmarks.serving import CHAT, PICTURE, messages, pdrop, running
from pdrop_jax.generation.pretrained import DEMO

GROWTH = 64 * 2**20  # bytes of memory that are no leak: allocators keep some of what they got


@dataclasses.dataclass(frozen=True)
class Flags:
    model: pathlib.Path = DEMO
    seconds: float = 60
    edge: int = 8000  # pixels of the largest picture that is answered
    good: int = 4  # clients of this kind at the same time, and of each bad kind
    slots: int = 4
    new_tokens: int = 32


def picture(width: int, height: int) -> str:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def bomb(width: int, height: int) -> str:
    """A PNG that only claims its size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk).decode()


def garbage(rng: random.Random, large: list[str]) -> bytes:
    """Bodies that are refused."""
    kinds = [
        lambda: rng.randbytes(rng.randrange(5000)),
        lambda: b'{"messages":' + b"[" * rng.randrange(50_000),
        lambda: json.dumps({"messages": messages("file:///etc/passwd")}).encode(),
        # Less than half: a PNG without its last bytes may still be decoded.
        lambda: json.dumps({"messages": messages(PICTURE[: rng.randrange(30, len(PICTURE) // 2)])}).encode(),
        lambda: json.dumps({"messages": messages(*rng.choices(large, k=rng.randint(1, 2)))}).encode(),
        lambda: json.dumps({"messages": messages(PICTURE), "regex": "(" * rng.randrange(1, 500)}).encode(),
        lambda: bytes(2**26 + 1),
    ]
    return rng.choices(kinds, [4, 4, 4, 4, 2, 4, 0.2])[0]()


class Soak:
    """The clients, and what they have seen.

    Attributes:
      counts: requests of each kind.
      wrong: whatever was not as it should be.
    """

    def __init__(self, client: httpx.AsyncClient, flags: Flags) -> None:
        self._client, self._tokens = client, flags.new_tokens
        self._large = [picture(9000, 9000), bomb(60_000, 60_000), bomb(9_000, 9_000)]
        self._fitting, self._expected = picture(flags.edge, flags.edge), ""
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self._until = time.monotonic() + flags.seconds

    def body(self, **options: Any) -> dict[str, Any]:
        return {"messages": messages(PICTURE), "temperature": 0, "max_tokens": self._tokens, **options}

    async def repeat(self, kind: str, seed: int) -> None:
        rng = random.Random(f"{kind} {seed}")
        while time.monotonic() < self._until:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            try:
                await getattr(self, kind)(rng)
            except Exception as error:
                self.wrong.append(f"{kind}: {error!r}")

    async def ask(self) -> None:
        while (answer := await self._client.post(CHAT, json=self.body())).status_code == 429:
            await asyncio.sleep(0.1)
        text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
        self._expected = self._expected or text
        if text != self._expected:
            self.wrong.append(f"good: {answer.status_code} {text[:200]}")

    async def good(self, rng: random.Random) -> None:
        await self.ask()

    async def large(self, rng: random.Random) -> None:
        """A picture that is just small enough."""
        answer = await self._client.post(CHAT, json={"messages": messages(self._fitting), "max_tokens": 1})
        if answer.status_code not in (200, 429):
            self.wrong.append(f"large: {answer.status_code} {answer.text[:200]}")

    async def bad(self, rng: random.Random) -> None:
        body = garbage(rng, self._large)
        answer = await self._client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        if answer.status_code not in (400, 413, 429) or "\n" in answer.json()["error"]["message"]:
            self.wrong.append(f"bad: {answer.status_code} {answer.text[:200]}")

    async def cancelling(self, rng: random.Random) -> None:
        body = self.body(
            stream=True, n=rng.randint(1, 3), temperature=1, regex="[a-z ]{900}" if rng.random() < 0.5 else None
        )
        async with self._client.stream("POST", CHAT, json=body) as response:
            events = response.aiter_lines()
            for _ in range(rng.randrange(6)):
                await anext(events, None)

    async def vanishing(self, rng: random.Random) -> None:
        """Leaves in the middle of its request, or before its answer."""
        url = self._client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        content = json.dumps(self.body()).encode()
        key = self._client.headers.get("Authorization", "")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
        writer.write(
            f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[: rng.choice([50, len(content)])]
        )
        await writer.drain()
        await asyncio.sleep(rng.random() / 5)
        writer.transport.abort()

    async def left(self) -> float:
        """Requests that the server runs or queues."""
        lines = (await self._client.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(("pdrop_running{", "pdrop_queue{")))

    async def finish(self, slots: int) -> None:
        """Waits until the server is idle, and asks as many questions at once as it has slots."""
        for _ in range(600):
            if not await self.left():
                break
            await asyncio.sleep(0.1)
        else:
            self.wrong.append(f"{await self.left():.0f} requests are left in the server")
        await asyncio.gather(*(self.ask() for _ in range(slots)))


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    fields = dict(line.split(":") for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


async def soak(url: str, pid: int | None, flags: Flags, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What the clients saw of a server; its memory only if ``pid`` is its process."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers) as client:
        clients, samples = Soak(client, flags), []

        async def watch() -> None:
            while pid:
                samples.append(memory(pid))
                await asyncio.sleep(min(1.0, flags.seconds / 20))

        watching = asyncio.create_task(watch())
        kinds = [kind for kind in ("good", "bad", "cancelling", "vanishing") for _ in range(flags.good)]
        await asyncio.gather(*(clients.repeat(kind, n) for n, kind in enumerate(["large", *kinds])))
        watching.cancel()
        await clients.finish(flags.slots)
    quarter, growth = len(samples) // 4, 0
    if quarter:
        growth = int(statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter]))
    if growth > GROWTH:
        clients.wrong.append(f"memory grew by {growth:,} bytes from the second quarter of the time to the last")
    return {
        "seconds": flags.seconds,
        "requests": clients.counts,
        "memory_growth_bytes": growth,
        "memory_bytes": samples[-1] if samples else None,
        "wrong": clients.wrong,
    }


def main(flags: Flags) -> None:
    with running(*pdrop(flags.model, flags)) as (url, process):
        found = asyncio.run(soak(url, process.pid, flags))
    print(json.dumps(found))
    if found["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Flags))
