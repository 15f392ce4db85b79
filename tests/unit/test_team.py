"""Nodes that train one run find each other, agree, and notice when one is gone; nothing here trains."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wait_until
from tests.servers.stores import MemoryBucket
from trainer.bucket.attempts import Attempt, claim
from trainer.bucket.commit import commit
from trainer.errors import ExitCode, NoFit, Unavailable, UserError
from trainer.fit import fit
from trainer.hardware import Shape
from trainer.job import Outcome
from trainer.recipe import load
from trainer.staged import Staged
from trainer.supervisor.team.connection import End, Link, Noticed, Ready, Rhythm
from trainer.supervisor.team.leader import Leader
from trainer.supervisor.team.member import Dismissed, Member
from trainer.supervisor.team.position import Position, position

SHAPE = Shape(accelerator="A100", count=8, memory_gib=40.0, cores=96, host_memory_gib=900.0, node="zero")
TWO = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.2", "MASTER_PORT": "29400"}


def never() -> bool:
    return False


def reject(step: int, reason: str) -> None:
    raise AssertionError(f"{step}: {reason}")


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def bucket() -> MemoryBucket:
    return MemoryBucket()


Pair = tuple[Leader, Member]


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run beside the test; what it returned or raised comes as the list's only item."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(work())
        except UserError as error:
            came.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, came


def meet(leader: Leader, member: Member, *, run: str = "run") -> list[Any]:
    """Both meet; what came of the member's side."""
    thread, came = in_thread(lambda: member.meet(run, never, patience_s=10))
    leader.meet("run", never, patience_s=10)
    attempt = Attempt(MemoryBucket(), 3, token="t")
    recipe = load("zephyr-tiny/sft").recipe
    leader.begin(attempt, fit(recipe, SHAPE.model_copy(update={"accelerator": None, "count": 0}), None), 100)
    thread.join(10)
    return came


@pytest.fixture
def pair(port: int) -> Iterator[Pair]:
    """Two nodes that have met; node 1 has less memory."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE, grace_s=0.2)
    small = SHAPE.model_copy(update={"host_memory_gib": 800.0, "cores": 90, "node": "one"})
    member = Member(Position(1, 2, "127.0.0.1", port), small)
    meet(leader, member)
    yield leader, member
    in_thread(lambda: member.end(ExitCode.DONE))
    leader.end(ExitCode.DONE)


def test_one_node_is_alone() -> None:
    """SkyPilot's number says 1, and torchrun's need not be there."""
    assert position({}) == position({"SKYPILOT_NUM_NODES": "1", "GROUP_WORLD_SIZE": "1"}) == Position()


def test_torchruns_variables_say_who_is_who() -> None:
    assert position({**TWO, "SKYPILOT_NUM_NODES": "2"}) == Position(1, 2, "10.0.0.2", 29400)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"GROUP_RANK": "2"}, "GROUP_RANK=2, but GROUP_WORLD_SIZE=2"),
        ({"GROUP_RANK": ""}, "GROUP_RANK is ''"),
        ({"GROUP_WORLD_SIZE": "two"}, "'two', which is no number from 1 on"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"GROUP_WORLD_SIZE": "1", "SKYPILOT_NUM_NODES": "4"}, "4 nodes were started for one run"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(change: dict[str, str], said: str) -> None:
    """Two nodes that each believe to be alone would claim the run from each other for ever."""
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        position({**TWO, **change})
    assert "jobs/*.yaml" in str(refused.value.hint)


def test_nodes_agree_on_what_all_have(pair: Pair) -> None:
    """The least of each node, and node 0's decisions."""
    leader, member = pair
    assert leader.shape == member.shape
    assert (leader.shape.nodes, leader.shape.cores, leader.shape.host_memory_gib) == (2, 90, 800.0)
    assert member.terms is not None
    assert (member.terms.attempt, member.terms.token, member.terms.predicted) == (3, "t", 100)
    assert leader.meeting is not None
    assert member.meeting == leader.meeting._replace(node=1)
    assert leader.broken is member.broken is None


def test_unlike_nodes_are_refused(port: int) -> None:
    """One fit cannot serve two kinds of GPU; both nodes say so."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE)
    other = SHAPE.model_copy(update={"accelerator": "H100", "memory_gib": 80.0})
    member = Member(Position(1, 2, "127.0.0.1", port), other)
    thread, came = in_thread(lambda: member.meet("run", never, patience_s=10))
    with pytest.raises(NoFit, match="not alike: A100:8 is node 0, H100:8 is node 1") as refused:
        leader.meet("run", never, patience_s=10)
    leader.end(refused.value.exit_code, refused.value.message)
    thread.join(10)
    assert isinstance(came[0], Dismissed)
    assert "not alike" in came[0].message


def test_a_node_of_another_run_is_sent_away(port: int) -> None:
    """Its recipe differs: it ends as misconfigured, and node 0 goes on waiting for its own."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE)
    stranger = Member(Position(1, 2, "127.0.0.1", port), SHAPE)
    thread, came = in_thread(lambda: stranger.meet("another", never, patience_s=10))
    with pytest.raises(Unavailable, match="node 1 of 2 did not come"):
        leader.meet("run", never, patience_s=1.5)
    thread.join(10)
    assert isinstance(came[0], Dismissed)
    assert came[0].exit_code == ExitCode.CONFIG


def test_nobody_waits_for_ever(port: int) -> None:
    """A node 0 that is not there can be recovered, and so can one whose machine goes meanwhile."""
    member = Member(Position(1, 2, "127.0.0.1", port), SHAPE)
    with pytest.raises(Unavailable, match="node 0 does not answer"):
        member.meet("run", never, patience_s=0.1)
    with pytest.raises(Unavailable, match="goes before the nodes"):
        Leader(Position(0, 2, "127.0.0.1", port), SHAPE).meet("run", lambda: True)


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use") as refused,
    ):
        Leader(Position(0, 2, "127.0.0.1", port), SHAPE).meet("run", never)
    assert "MASTER_PORT" in str(refused.value.hint)


def committed(bucket: MemoryBucket, attempt: Attempt, staging: Path, step: int) -> None:
    folder = staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"%d" % step)
    commit(bucket, attempt, staging, Staged(folder=folder.name, step=step), "digest")


def test_every_node_has_node_0s_checkpoint(pair: Pair, bucket: MemoryBucket, tmp_path: Path) -> None:
    """The newest is damaged: node 0 rejects it, and both bring the one before."""
    leader, member = pair
    attempt = claim(bucket, {})
    for step in (10, 20):
        committed(bucket, attempt, tmp_path / "staging", step)
    bucket.put("checkpoints/step-00000020/0001/weights.bin", b"XX")
    rejected: list[int] = []
    thread, came = in_thread(lambda: member.restore(bucket, tmp_path / "one", lambda *_: None))
    mine = leader.restore(bucket, tmp_path / "zero", lambda step, _: rejected.append(step))
    thread.join(10)
    assert rejected == [20]
    assert mine is not None
    assert (mine.manifest.step, came[0].manifest.step) == (10, 10)
    assert (tmp_path / "one" / "checkpoint-10" / "weights.bin").read_bytes() == b"10"


def test_a_run_without_checkpoints_begins_on_all(pair: Pair, bucket: MemoryBucket, tmp_path: Path) -> None:
    leader, member = pair
    thread, came = in_thread(lambda: member.restore(bucket, tmp_path / "one", reject))
    assert leader.restore(bucket, tmp_path / "zero", reject) is None
    thread.join(10)
    assert came == [None]


def test_a_node_that_gives_up_during_the_restore_ends_it(
    pair: Pair, bucket: MemoryBucket, tmp_path: Path
) -> None:
    """Node 0 would wait for it for ever."""
    leader, member = pair
    thread, came = in_thread(lambda: leader.restore(bucket, tmp_path / "zero", reject))
    member.end(ExitCode.RECOVER, "the bucket cannot be read here")
    thread.join(10)
    assert isinstance(came[0], Unavailable)
    assert "node 1 has given up: the bucket cannot be read here" in came[0].message


def test_a_node_that_is_gone_is_seen_by_the_other(pair: Pair) -> None:
    """The end of its process closes its connection."""
    leader, member = pair
    member._there.close()
    assert (
        wait_until(lambda: leader.broken, "the loss", timeout_s=10) == "node 1 is gone: its supervisor ended"
    )


def test_a_node_that_falls_silent_counts_as_gone() -> None:
    """A machine without power closes no connection: only its pulse stops."""
    here, there = socket.socketpair()
    link = Link(here, "node 1", Rhythm(every_s=0.05, silence_s=0.3))
    assert wait_until(lambda: link.gone, "the silence", timeout_s=10).startswith("node 1 has said nothing")
    there.close()


def test_a_pulse_keeps_a_silent_node_alive() -> None:
    """Two ends that say nothing for longer than the silence that is allowed are both there."""
    ends = socket.socketpair()
    links = [Link(end, "the other", Rhythm(every_s=0.05, silence_s=0.5)) for end in ends]
    time.sleep(1.0)
    assert [link.gone for link in links] == [None, None]
    for link in links:
        link.close()


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\n", b'{"kind": "terms"}\n', b'{"kind": "x"}\n', b"[]\n"])
def test_what_is_no_node_is_not_listened_to(line: bytes) -> None:
    """Whoever knocks at the port says something that we do not understand, and that is all."""
    here, there = socket.socketpair()
    link = Link(here, "somebody")
    there.sendall(line)
    assert "another language" in wait_until(lambda: link.gone, "the refusal", timeout_s=10)
    there.close()


def test_a_message_may_come_in_pieces() -> None:
    here, there = socket.socketpair()
    link = Link(here, "node 1")
    data = Noticed(source="SIGTERM").model_dump_json().encode() + b"\n"
    there.sendall(data[:9])
    time.sleep(0.05)
    there.sendall(data[9:] + Ready().model_dump_json().encode() + b"\n")
    wait_until(lambda: link.take(Ready), "the second message", timeout_s=10)
    assert link.take(Noticed) == Noticed(source="SIGTERM")
    assert link.take(End) is None
    link.close()
    there.close()


def test_a_notice_on_any_node_reaches_node_0(pair: Pair) -> None:
    leader, member = pair
    member.notice("GCE preemption")
    assert wait_until(lambda: leader.noticed, "the notice", timeout_s=10) == "GCE preemption on node 1"
    assert leader.noticed
    assert leader.broken is None


def test_what_a_user_did_wrong_is_heard_from_any_node(pair: Pair) -> None:
    """Node 0's own rank only knows that its partner is gone."""
    leader, member = pair
    wrong = Outcome(status="user_error", message="no such model")
    member.ended(1, wrong)
    assert leader.ended(1, None) == (1, wrong)


def test_a_rank_that_was_killed_explains_the_others(pair: Pair) -> None:
    """Signal 9 on node 1 is for a recovery; the error that it caused on node 0 is no bug."""
    leader, member = pair
    member.ended(-9, None)
    assert leader.ended(1, None) == (-9, None)
    assert (
        wait_until(lambda: leader.broken, "the failure", timeout_s=10) == "the workers of node 1 have failed"
    )


def test_all_nodes_end_with_node_0s_code(pair: Pair) -> None:
    """Node 0 alone knows whether the commit went well."""
    leader, member = pair
    member.ended(0, Outcome(status="done"))
    thread, came = in_thread(lambda: member.end(ExitCode.RECOVER))
    leader.end(ExitCode.DONE)
    thread.join(10)
    assert came == [ExitCode.DONE]


def test_without_node_0_the_others_are_recovered(pair: Pair) -> None:
    leader, member = pair
    member.ended(0, Outcome(status="done"))
    for link in leader._links.values():
        link.close()
    leader._links.clear()
    assert member.end(ExitCode.DONE) == ExitCode.RECOVER
