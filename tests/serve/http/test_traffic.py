"""A server that drains ends what runs, and lets nobody in."""

import asyncio

from qe_dist.serve.http.traffic import Message, Receive, Send, Traffic


async def receive() -> Message:
    return {"type": "http.request"}


def test_draining_waits_for_what_runs_and_refuses_what_comes() -> None:
    async def story() -> None:
        traffic, go, told = Traffic(), asyncio.Event(), list[Message]()

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await go.wait()
            await send({"type": "http.response.start", "status": 200})

        async def send(message: Message) -> None:
            told.append(message)

        server = traffic.around(app)
        running = asyncio.create_task(server({"type": "http"}, receive, send))
        await asyncio.sleep(0)
        drained = asyncio.create_task(traffic.drain())
        await asyncio.sleep(0)
        await server({"type": "http"}, receive, send)
        assert [m["status"] for m in told if "status" in m] == [503]
        await asyncio.sleep(0.2)
        assert not drained.done()
        go.set()
        await running
        await asyncio.wait_for(drained, 1)
        assert [m["status"] for m in told if "status" in m] == [503, 200]

    asyncio.run(story())


def test_a_request_that_fails_or_is_cancelled_runs_no_longer() -> None:
    async def story() -> None:
        traffic = Traffic()

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await asyncio.sleep(60)

        task = asyncio.create_task(traffic.around(app)({"type": "http"}, receive, receive))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert traffic.running == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert traffic.running == 0

    asyncio.run(story())
