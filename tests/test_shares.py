"""Whose job gets the next place of a site: fair shares of tenants, and urgency among the jobs of one."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from functions.ensembles import urgency
from functions.shares import Shares, Used
from headrace.wire import Invocation, Payload


class Held(Struct, frozen=True):
    invocation: Invocation
    seq: int

    @property
    def tenant(self) -> str:
        return self.invocation.tenant


def held(seq: int, tenant: str = "a", deadline: float | None = None, due: float | None = None) -> Held:
    return Held(
        Invocation(
            run_id="r",
            invocation_id=f"i{seq}",
            function="headrace.job",
            version="",
            route="",
            tenant=tenant,
            payload=Payload(),
            accepted_at=0.0,
            sent_at=0.0,
            deadline=deadline,
            due=due,
        ),
        seq,
    )


def seqs(jobs: list[Held]) -> list[int]:
    return [job.seq for job in jobs]


def test_what_is_due_first_goes_first_then_what_came_first() -> None:
    waiting = [held(1), held(2, deadline=50.0), held(3, deadline=90.0, due=40.0), held(4), held(5, deadline=50.0)]
    assert seqs(Shares().next(waiting, {}, 10)) == [3, 2, 5, 1, 4]
    assert seqs(Shares().next(waiting, {}, 2)) == [3, 2]
    assert Shares().next(waiting, {}, 0) == []
    assert Shares().next(waiting, {}, -3) == []


def test_the_next_free_place_goes_to_the_one_who_has_none() -> None:
    waiting = [*(held(n, "a", deadline=10.0) for n in range(1000)), held(2000, "b")]
    assert seqs(Shares().next(waiting, {"a": 4}, 1)) == [2000]
    assert 2000 in seqs(Shares().next(waiting, {}, 2))


def test_an_ensemble_of_one_takes_only_its_share_of_what_is_free() -> None:
    waiting = [*(held(n, "a") for n in range(1000)), *(held(n, "b") for n in range(2000, 3000)), held(4000, "c")]
    assert Counter(job.tenant for job in Shares().next(waiting, {}, 101)) == {"a": 50, "b": 50, "c": 1}


def test_who_has_used_less_time_goes_first_where_all_have_as_many_places() -> None:
    shares = Shares()
    waiting = [held(1, "a"), held(2, "a"), held(3, "b"), held(4, "b")]
    assert seqs(shares.next(waiting, {}, 1)) == [1]
    shares.ended("a", 3600.0)
    order = []
    for _ in range(3):  # one place: b has it until he has had it for as long
        (job,) = shares.next([held(2, "a"), held(3, "b")], {}, 1)
        order.append(job.tenant)
        shares.ended(job.tenant, 2000.0)
    assert order == ["b", "b", "a"]


def test_who_comes_back_has_no_claim_on_the_time_he_was_away() -> None:
    shares = Shares()
    for _ in range(100):
        assert shares.next([held(1, "a")], {}, 1)
        shares.ended("a", 60.0)
    taken = []
    for _ in range(10):
        (job,) = shares.next([held(1, "a"), held(2, "b")], {}, 1)
        taken.append(job.tenant)
        shares.ended(job.tenant, 60.0)
    assert 4 <= taken.count("a") <= 6


def test_who_comes_back_to_the_slots_of_a_worker_begins_where_the_others_are() -> None:
    used = Used()
    assert used.join("a") == 0.0
    assert used.use("a", 10.0) == 10.0
    used.turn(10.0)
    assert used.join("b") == 10.0
    assert used.join("a") == 10.0
    assert used.of("c") == 0.0


jobs = st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.floats(0.0, 100.0)), max_size=40).map(
    lambda drawn: [held(seq, tenant, deadline) for seq, (tenant, deadline) in enumerate(drawn)]
)
places = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9))
past = st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0.0, 1e6)), max_size=8)


@given(jobs, places, past, st.integers(0, 50))
def test_no_place_stays_free_and_none_has_two_more_than_another_who_waits(
    waiting: list[Held], has: dict[str, int], ended: list[tuple[str, float]], free: int
) -> None:
    shares = Shares()
    for tenant, seconds in ended:
        shares.ended(tenant, seconds)
    begun = shares.next(waiting, has, free)
    assert len(begun) == len({job.seq for job in begun}) == min(free, len(waiting))
    got = Counter(job.tenant for job in begun)
    left = Counter(job.tenant for job in waiting) - got
    after = {tenant: has.get(tenant, 0) + got[tenant] for tenant in "abcd"}
    assert all(after[one] - 1 <= after[other] for one in got for other in left)


@given(jobs, places, st.integers(0, 50))
def test_within_a_tenant_the_most_urgent_go_first(waiting: list[Held], has: dict[str, int], free: int) -> None:
    begun = Shares().next(waiting, has, free)
    for tenant in "abcd":
        mine = [urgency(job) for job in begun if job.tenant == tenant]
        assert mine == sorted(urgency(job) for job in waiting if job.tenant == tenant)[: len(mine)]


@given(jobs, places, st.integers(1, 50))
def test_a_single_job_of_another_is_among_the_next(waiting: list[Held], has: dict[str, int], free: int) -> None:
    """Of one who has no place: before anybody of those who wait gets a second place beyond his."""
    begun = Shares().next([*waiting, held(1000, "z")], has, free)
    tenants_without = {job.tenant for job in waiting if not has.get(job.tenant)}
    assert 1000 in seqs(begun[: 1 + len(tenants_without)]) or free <= len(tenants_without)
