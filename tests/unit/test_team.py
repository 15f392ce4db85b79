"""The nodes of one run connect, agree on the attempt, and detect a lost node. No training program runs here."""

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
from trainer.supervisor.team.base import Position, read_position
from trainer.supervisor.team.connection import AttemptEnded, HeartbeatTiming, Link, Noticed, Ready
from trainer.supervisor.team.leader import Leader
from trainer.supervisor.team.member import EndedByLeader, Member

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
    """Run `work` in a thread. The list receives one item: its result, or the error that it raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except UserError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def connect(leader: Leader, member: Member, *, run: str = "run") -> list[Any]:
    """Connect both nodes and announce an attempt. Return the result of the member's side."""
    thread, results = in_thread(lambda: member.connect(run, never, timeout_s=10))
    leader.connect("run", never, timeout_s=10)
    attempt = Attempt(MemoryBucket(), 3, token="t")
    recipe = load("zephyr-tiny/sft").recipe
    leader.announce(
        attempt, fit(recipe, SHAPE.model_copy(update={"accelerator": None, "count": 0}), None), 100
    )
    thread.join(10)
    return results


@pytest.fixture
def pair(port: int) -> Iterator[Pair]:
    """Two connected nodes. Node 1 has less memory and fewer cores than node 0."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE, grace_s=0.2)
    small = SHAPE.model_copy(update={"host_memory_gib": 800.0, "cores": 90, "node": "one"})
    member = Member(Position(1, 2, "127.0.0.1", port), small)
    connect(leader, member)
    yield leader, member
    in_thread(lambda: member.end(ExitCode.DONE))
    leader.end(ExitCode.DONE)


def test_one_node_needs_no_variables() -> None:
    """A run on one node works without torchrun's variables."""
    assert (
        read_position({}) == read_position({"SKYPILOT_NUM_NODES": "1", "GROUP_WORLD_SIZE": "1"}) == Position()
    )


def test_the_position_comes_from_torchruns_variables() -> None:
    """The rank, the number of nodes and node 0's address are read from the environment."""
    assert read_position({**TWO, "SKYPILOT_NUM_NODES": "2"}) == Position(1, 2, "10.0.0.2", 29400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"GROUP_RANK": "2"}, "GROUP_RANK=2 is not below GROUP_WORLD_SIZE=2"),
        ({"GROUP_RANK": ""}, "GROUP_RANK is ''"),
        ({"GROUP_WORLD_SIZE": "two"}, "'two'; it must be a whole number of at least 1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR (node 0's address) is not set"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"GROUP_WORLD_SIZE": "1", "SKYPILOT_NUM_NODES": "4"}, "4 nodes were started for one run"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(change: dict[str, str], message: str) -> None:
    """Otherwise two nodes that each assume to be alone would take the claim from each other forever."""
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        read_position({**TWO, **change})
    assert "jobs/*.yaml" in str(refused.value.hint)


def test_nodes_agree_on_the_combined_shape_and_the_terms(pair: Pair) -> None:
    """The shape has the minimum of each resource, and the terms are node 0's decisions."""
    leader, member = pair
    assert leader.shape == member.shape
    assert (leader.shape.nodes, leader.shape.cores, leader.shape.host_memory_gib) == (2, 90, 800.0)
    assert member.terms is not None
    assert (member.terms.attempt, member.terms.token, member.terms.predicted) == (3, "t", 100)
    assert leader.rendezvous is not None
    assert member.rendezvous == leader.rendezvous._replace(node=1)
    assert leader.failure is member.failure is None


def test_unlike_nodes_are_refused(port: int) -> None:
    """One fit cannot serve two kinds of GPU, so both nodes fail with a message that names both."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE)
    other = SHAPE.model_copy(update={"accelerator": "H100", "memory_gib": 80.0})
    member = Member(Position(1, 2, "127.0.0.1", port), other)
    thread, results = in_thread(lambda: member.connect("run", never, timeout_s=10))
    with pytest.raises(NoFit, match="different GPUs: node 0 has A100:8, node 1 has H100:8") as refused:
        leader.connect("run", never, timeout_s=10)
    leader.end(refused.value.exit_code, refused.value.message)
    thread.join(10)
    assert isinstance(results[0], EndedByLeader)
    assert "different GPUs" in results[0].message


def test_a_node_of_another_run_is_turned_away(port: int) -> None:
    """A node with another recipe fails with the configuration exit code, and node 0 continues to wait."""
    leader = Leader(Position(0, 2, "127.0.0.1", port), SHAPE)
    stranger = Member(Position(1, 2, "127.0.0.1", port), SHAPE)
    thread, results = in_thread(lambda: stranger.connect("another", never, timeout_s=10))
    with pytest.raises(Unavailable, match="node 1 of 2 did not connect"):
        leader.connect("run", never, timeout_s=1.5)
    thread.join(10)
    assert isinstance(results[0], EndedByLeader)
    assert results[0].exit_code == ExitCode.CONFIG


def test_waiting_for_other_nodes_ends_with_a_recoverable_error(port: int) -> None:
    """A member gives up on a missing node 0, and node 0 gives up when its own machine is preempted."""
    member = Member(Position(1, 2, "127.0.0.1", port), SHAPE)
    with pytest.raises(Unavailable, match="node 0 does not answer"):
        member.connect("run", never, timeout_s=0.1)
    with pytest.raises(Unavailable, match="preempted before all nodes"):
        Leader(Position(0, 2, "127.0.0.1", port), SHAPE).connect("run", lambda: True)


def test_a_port_in_use_is_a_user_error(port: int) -> None:
    """The message names the address, and the hint names the variable to change."""
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(UserError, match=f"127.0.0.1:{port}.*in use") as refused,
    ):
        Leader(Position(0, 2, "127.0.0.1", port), SHAPE).connect("run", never)
    assert "MASTER_PORT" in str(refused.value.hint)


def committed(bucket: MemoryBucket, attempt: Attempt, staging: Path, step: int) -> None:
    folder = staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"%d" % step)
    commit(bucket, attempt, staging, Staged(folder=folder.name, step=step), "digest")


def test_every_node_restores_the_checkpoint_of_node_0(
    pair: Pair, bucket: MemoryBucket, tmp_path: Path
) -> None:
    """The newest checkpoint is damaged: node 0 rejects it, and both nodes fetch the one before."""
    leader, member = pair
    attempt = claim(bucket, {})
    for step in (10, 20):
        committed(bucket, attempt, tmp_path / "staging", step)
    bucket.put("checkpoints/step-00000020/0001/weights.bin", b"XX")
    rejected: list[int] = []
    thread, results = in_thread(lambda: member.restore(bucket, tmp_path / "one", lambda *_: None))
    mine = leader.restore(bucket, tmp_path / "zero", lambda step, _: rejected.append(step))
    thread.join(10)
    assert rejected == [20]
    assert mine is not None
    assert (mine.manifest.step, results[0].manifest.step) == (10, 10)
    assert (tmp_path / "one" / "checkpoint-10" / "weights.bin").read_bytes() == b"10"


def test_a_run_without_checkpoints_starts_on_every_node(
    pair: Pair, bucket: MemoryBucket, tmp_path: Path
) -> None:
    """Every node returns None, and training starts at step 0."""
    leader, member = pair
    thread, results = in_thread(lambda: member.restore(bucket, tmp_path / "one", reject))
    assert leader.restore(bucket, tmp_path / "zero", reject) is None
    thread.join(10)
    assert results == [None]


def test_a_node_that_gives_up_during_the_restore_ends_it(
    pair: Pair, bucket: MemoryBucket, tmp_path: Path
) -> None:
    """Otherwise node 0 would wait forever for that node to become ready."""
    leader, member = pair
    thread, results = in_thread(lambda: leader.restore(bucket, tmp_path / "zero", reject))
    member.end(ExitCode.RECOVER, "the bucket cannot be read here")
    thread.join(10)
    assert isinstance(results[0], Unavailable)
    assert "node 1 has given up: the bucket cannot be read here" in results[0].message


def test_a_node_whose_process_ended_counts_as_lost(pair: Pair) -> None:
    """The end of a process closes its connection, which the other node detects."""
    leader, member = pair
    member._leader.close()
    assert (
        wait_until(lambda: leader.failure, "the loss", timeout_s=10) == "node 1 is lost: its supervisor ended"
    )


def test_a_silent_node_counts_as_lost() -> None:
    """A machine that loses power closes no connection, but its heartbeats stop."""
    near, far = socket.socketpair()
    link = Link(near, "node 1", HeartbeatTiming(every_s=0.05, timeout_s=0.3))
    assert wait_until(lambda: link.lost, "the silence", timeout_s=10).startswith(
        "node 1 has sent no heartbeat"
    )
    far.close()


def test_heartbeats_keep_an_idle_connection_alive() -> None:
    """Two ends that send no messages for longer than the timeout both stay connected."""
    ends = socket.socketpair()
    links = [Link(end, "the other", HeartbeatTiming(every_s=0.05, timeout_s=0.5)) for end in ends]
    time.sleep(1.0)
    assert [link.lost for link in links] == [None, None]
    for link in links:
        link.close()


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\n", b'{"kind": "terms"}\n', b'{"kind": "x"}\n', b"[]\n"])
def test_an_invalid_message_ends_the_connection(line: bytes) -> None:
    """A program that is not one of our nodes may connect to the port; only its own connection is dropped."""
    near, far = socket.socketpair()
    link = Link(near, "a stranger")
    far.sendall(line)
    assert "invalid message" in wait_until(lambda: link.lost, "the refusal", timeout_s=10)
    far.close()


def test_a_message_may_arrive_in_pieces() -> None:
    """A message that is split over two packets is read as one, and messages keep their order."""
    near, far = socket.socketpair()
    link = Link(near, "node 1")
    data = Noticed(source="SIGTERM").model_dump_json().encode() + b"\n"
    far.sendall(data[:9])
    time.sleep(0.05)
    far.sendall(data[9:] + Ready().model_dump_json().encode() + b"\n")
    wait_until(lambda: link.take(Ready), "the second message", timeout_s=10)
    assert link.take(Noticed) == Noticed(source="SIGTERM")
    assert link.take(AttemptEnded) is None
    link.close()
    far.close()


def test_a_notice_on_any_node_reaches_node_0(pair: Pair) -> None:
    """A preemption notice is no failure; it names its source and its node."""
    leader, member = pair
    member.send_notice("GCE preemption")
    assert wait_until(lambda: leader.peer_notice, "the notice", timeout_s=10) == "GCE preemption on node 1"
    assert leader.peer_notice
    assert leader.failure is None


def test_a_user_error_on_any_node_is_the_outcome(pair: Pair) -> None:
    """Node 0's own rank only knows that it lost its peer."""
    leader, member = pair
    wrong = Outcome(status="user_error", message="no such model")
    member.combine_outcomes(1, wrong)
    assert leader.combine_outcomes(1, None) == (1, wrong)


def test_a_rank_that_was_killed_explains_the_others(pair: Pair) -> None:
    """Signal 9 on node 1 leads to a recovery, and the error that it caused on node 0 is not reported as a bug."""
    leader, member = pair
    member.combine_outcomes(-9, None)
    assert leader.combine_outcomes(1, None) == (-9, None)
    assert (
        wait_until(lambda: leader.failure, "the failure", timeout_s=10) == "the workers of node 1 have failed"
    )


def test_all_nodes_end_with_node_0s_code(pair: Pair) -> None:
    """Only node 0 knows whether the commit succeeded."""
    leader, member = pair
    member.combine_outcomes(0, Outcome(status="done"))
    thread, results = in_thread(lambda: member.end(ExitCode.RECOVER))
    leader.end(ExitCode.DONE)
    thread.join(10)
    assert results == [ExitCode.DONE]


def test_without_node_0_the_other_nodes_ask_for_a_recovery(pair: Pair) -> None:
    """A member that loses node 0 after its workers ended cannot know whether the run is done."""
    leader, member = pair
    member.combine_outcomes(0, Outcome(status="done"))
    for link in leader._links.values():
        link.close()
    leader._links.clear()
    assert member.end(ExitCode.DONE) == ExitCode.RECOVER
