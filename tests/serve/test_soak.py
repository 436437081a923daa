"""A few seconds of the soak: ("soak"). Memory is not watched, because the clients are in the server's process."""

import asyncio

from served import KEY, SLOTS

from benchmarks.soak import Flags, soak


def test_no_slot_is_lost_to_clients_that_misbehave(url, idle):
    flags = Flags(seconds=3, edge=1000, good=2, slots=SLOTS, new_tokens=4)
    found = asyncio.run(soak(url, None, flags, {"Authorization": f"Bearer {KEY}"}))
    assert found["wrong"] == []
    assert found["requests"].keys() == {"good", "large", "bad", "cancelling", "vanishing"}
    idle()
