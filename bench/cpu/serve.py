"""The server under load: its speed over the engine's, faults of its clients, and its memory.

The server is a process of its own, as users start it; the clients share the machine with it. Four parts:

- speed: the same requests by HTTP, many at once, and by an engine in this process, in turns. The share is
  what HTTP, the event loop and the clients leave of the engine's tokens per second. The time to the first
  token is the clients' own.
- faults: streams of which a third are cut off at random. `wrong` are streams of the others whose text is not
  that of `generate`; `left` are requests that still have a place in the server afterwards.
- pace: milliseconds to the first token, of a short request that comes while a long prompt is worked on, and
  of each turn of a conversation, which sends all turns before it.
- memory: resident megabytes of the server over requests of all kinds, refused and cut off ones included.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import torch

import river_ext
from bench.lib.common import machine, parser, results_path, save

# of a conversation, one after the other
QUESTIONS = (
    "How do bridges carry their load, and why did the Romans build so many of them with arches?",
    "Which materials came later, and what did they change for those who wanted longer spans?",
    "Why did some bridges fail, and what did engineers learn from each of them?",
)
PARTS = ("speed", "faults", "pace", "memory")


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--model", help="a checkpoint's directory; the bundled model where none is named")
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--max-len", type=int, default=512, help="positions of a slot")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--streams", type=int, default=200, help="of the part faults")
    p.add_argument("--requests", type=int, default=5000, help="of the part memory")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    name = Path(args.model).name if args.model else "bundled"
    path = results_path(f"serve_{name}", args)
    model = river_ext.load(args.model, device="cpu")
    results = {"machine": machine(), "model": name}
    with served(args) as (server, client):
        for part in args.parts:
            results[part] = asyncio.run(globals()[part](args, model, server, client))
            print(part, json.dumps(results[part], indent=1), flush=True)
    print(save(path, results))


@contextmanager
def served(args):
    """A server's process, and what makes clients of it."""
    source = ["--model", args.model] if args.model else ["--demo"]
    command = [sys.executable, "-m", "river_cli", "serve", *source, "--port", "0", "--json"]
    command += ["--queue", str(args.streams), "--threads", str(args.threads)]
    command += ["--max-len", str(args.max_len)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        url = json.loads(process.stdout.readline())["url"]
        limits = httpx.Limits(max_connections=args.streams)
        yield process, lambda: httpx.AsyncClient(base_url=url, timeout=600, limits=limits)
    finally:
        process.kill()
        process.wait()


def request_of(number: int, new_tokens: int) -> dict:
    """Options of `generate`. Hot enough that texts of the bundled model are long."""
    return {
        "prompt": f"Question: {number}", "mode": "full", "temperature": 3.0, "seed": number,
        "max_new_tokens": new_tokens,
    }  # fmt: skip


def body_of(number: int, new_tokens: int, **more) -> dict:
    options = request_of(number, new_tokens)
    return options | {"max_tokens": options.pop("max_new_tokens")} | more


async def stream(client, body: dict, cut: int | None = None) -> tuple[str, int, float]:
    """Text, tokens and seconds to the first; with `cut` it ends after so many events."""
    start, text, tokens, first, events = time.perf_counter(), "", 0, None, 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - start
            event = json.loads(line.removeprefix("data: "))
            text += event["choices"][0]["text"]
            tokens = event.get("river", {"new_tokens": 0})["new_tokens"]
            events += 1
            if events == cut:
                break
    return text, tokens, first


async def speed(args, model, server, client) -> list[dict]:
    lines = []
    with model.engine(slots=8, max_len=args.max_len) as engine:
        for count in args.at_once:
            bodies = [body_of(number, args.new_tokens) for number in range(max(count, 8))]
            by_server, by_engine, firsts = [], [], []
            for turn in range(args.turns + 1):
                by_engine.append(engine_speed(engine, count, len(bodies), args.new_tokens))
                tokens, seconds, first = await server_speed(client, bodies, count)
                by_server.append(tokens / seconds)
                firsts += first if turn else []
            ratios = [a / b for a, b in zip(by_server[1:], by_engine[1:], strict=True)]  # the first warms up
            lines.append({
                "at_once": count, "server_tokens_per_second": median(by_server[1:]),
                "engine_tokens_per_second": median(by_engine[1:]), "share": median(ratios), "shares": ratios,
                "first_token_ms": 1e3 * median(firsts), "first_token_ms_worst": 1e3 * max(firsts),
            })  # fmt: skip
    return lines


def engine_speed(engine, at_once: int, requests: int, new_tokens: int) -> float:
    """Tokens per second, with so many requests in the engine at a time."""
    start, tokens, begun, ended = time.perf_counter(), 0, 0, 0
    while ended < requests:
        while begun < min(requests, ended + at_once):
            engine.submit(**request_of(begun, new_tokens))
            begun += 1
        events = engine.step()
        tokens += sum(event.piece is not None for event in events)
        ended += sum(event.output is not None for event in events)
    return tokens / (time.perf_counter() - start)


async def server_speed(client, bodies: list[dict], at_once: int) -> tuple[int, float, list[float]]:
    places = asyncio.Semaphore(at_once)

    async def one(body):
        async with places:
            return await stream(session, body)

    async with client() as session:
        start = time.perf_counter()
        done = await asyncio.gather(*map(one, bodies))
        seconds = time.perf_counter() - start
    return sum(tokens for _, tokens, _ in done), seconds, [first for _, _, first in done]


async def faults(args, model, server, client) -> dict:
    choose = random.Random(0)
    cut = {number: choose.randrange(1, 8) for number in choose.sample(range(args.streams), args.streams // 3)}
    numbers = range(args.streams)
    async with client() as session:
        done = await asyncio.gather(
            *(stream(session, body_of(number, args.new_tokens), cut.get(number)) for number in numbers),
            return_exceptions=True,
        )
        await asyncio.sleep(2)
        left = await metric(session, "river_requests_running")  # those with a place have the slots first
        disconnected = await metric(session, 'river_requests_total{outcome="disconnected"}')
    whole = [number for number in numbers if number not in cut]
    expected = model.generate(
        [request_of(number, 1)["prompt"] for number in whole], mode="full", temperature=3.0, seed=whole,
        max_new_tokens=args.new_tokens,
    )  # fmt: skip
    lost = [number for number in whole if isinstance(done[number], BaseException)]
    texts = [(done[number], output.text) for number, output in zip(whole, expected, strict=True)]
    wrong = sum(got[0] != text for got, text in texts if not isinstance(got, BaseException))
    return {
        "streams": args.streams, "cut_off": len(cut), "whole": len(whole), "lost": len(lost), "wrong": wrong,
        "noticed": int(disconnected), "left": int(left),
    }  # fmt: skip


async def pace(args, model, server, client) -> dict:
    """Of full depth. The long prompt fills a slot; the short request comes a tenth of its time later."""
    choose = random.Random(0)

    def body(tokens: int) -> dict:
        prompt = [choose.randrange(model.config.vocab_size) for _ in range(tokens)]
        return body_of(0, 2, prompt=prompt)

    long = args.max_len - 8
    async with client() as session:
        await stream(session, body(30))
        _, _, alone = await stream(session, body(long))
        task = asyncio.create_task(stream(session, body(long)))
        await asyncio.sleep(alone / 10)
        _, _, short = await stream(session, body(30))
        _, _, beside = await task
        turns, said = [], ""
        for number in range(8):
            said += f"Question: {QUESTIONS[number % len(QUESTIONS)]}\nAnswer:"
            text, _, first = await stream(
                session, body_of(number, args.new_tokens, prompt=said, temperature=0)
            )
            said += text + "\n"
            turns.append(1e3 * first)
    return {
        "long_prompt_tokens": long, "short_prompt_tokens": 30, "long_alone_ms": 1e3 * alone,
        "short_ms": 1e3 * short, "long_beside_ms": 1e3 * beside, "turns_ms": turns,
        "last_prompt_tokens": len(model.text.encode(said)),
    }  # fmt: skip


async def memory(args, model, server, client) -> dict:
    """A tenth of the requests is refused, a tenth cut off, and half of the rest are streams."""
    megabytes, step = [], max(1, args.requests // 10)
    async with client() as session:
        places = asyncio.Semaphore(32)

        async def one(number: int) -> None:
            async with places:
                if number % 10 == 0:
                    await session.post("/v1/completions", json=body_of(number, 2, n=2))
                elif number % 10 == 1:
                    await stream(session, body_of(number, 50), cut=1)
                elif number % 2:
                    await stream(session, body_of(number, 2))
                else:
                    (await session.post("/v1/completions", json=body_of(number, 2))).raise_for_status()

        for begin in range(0, args.requests, step):
            await asyncio.gather(*map(one, range(begin, min(begin + step, args.requests))))
            megabytes.append(resident_megabytes(server.pid))
    return {"requests": args.requests, "megabytes_after_each_tenth": megabytes}


async def metric(session, name: str) -> float:
    text = (await session.get("/metrics")).text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])


def resident_megabytes(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    main()
