"""The live page in a real browser: what it says, what it never does, and that it stays alive."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs
from playwright.async_api import Browser, Page, async_playwright, expect

from headrace import AsyncClient
from headrace.joblog import Report, SiteRecord
from headrace.model import ErrorInfo, Quote, Verdict
from headrace.wire import encode
from streams.log import Record
from streams.topology import report_subject
from tests.platforms import UpProcess
from tests.test_submitting import beginning, job_of, submission, submit, succeed
from tests.watched import TOKEN, Stage, Watched, text_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET_BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
HOSTILE = "<img src=x onerror=window.pwned=1>"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"),
]
expect.set_options(timeout=20_000)

Show = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET_BROWSER)
        yield opened
        await opened.close()


@pytest_asyncio.fixture(loop_scope="module")
async def watched(browser: Browser) -> AsyncIterator[list[Watched]]:
    """Pages as they are opened. Whatever a test does, nothing may go wrong in them and nothing may leave the origin."""
    pages: list[Watched] = []
    yield pages
    for one in pages:
        assert one.errors == []
        assert one.strangers(one.page.url) == []
        assert await one.page.evaluate("window.pwned") is None
        await one.page.context.close()


@pytest_asyncio.fixture(loop_scope="module")
async def show(browser: Browser, watched: list[Watched]) -> Show:
    """Return what opens the page of a platform, ready and live."""

    async def open_page(url: str, token: str = TOKEN, **context: Any) -> Page:
        page = await (await browser.new_context(**context)).new_page()
        watched.append(Watched(page))
        await page.goto(f"{url}#token={token}")
        await expect(page.get_by_role("status")).to_have_text("Live")
        return page

    return open_page


@pytest_asyncio.fixture(loop_scope="module")
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    opened = Stage(tmp_path)
    await opened.open()
    yield opened
    await opened.close()


# ---------------------------------------------------------------- on a whole platform

USER_FILE = """
import time
from pathlib import Path

from headrace import Context, on, function

@on(deadline="1h", name="shots")
@function(timeout="60s")
def analyse_shot(go: str, ctx: Context) -> dict:
    ctx.progress(0.5, "waiting for the shot")
    while not Path(go).exists():
        time.sleep(0.01)
    return {"q95": 4.1}

@function
def glance(go: str) -> str:
    return "about four"

@on(deadline="3s", on_late="degrade", name="looks")
@function(timeout="60s", variants=[glance])
def look(go: str) -> str:
    while not Path(go).exists():
        time.sleep(0.01)
    return "4.1"

@on(deadline="1h", name="spoiled")
@function
def spoil(text: str) -> None:
    raise ValueError(text)
"""


@pytest_asyncio.fixture(loop_scope="module")
async def client(shared_platform: UpProcess, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """A client of a platform on which the user's file above is deployed."""
    path = tmp_path / "page_shots.py"
    path.write_text(USER_FILE)
    async with AsyncClient(shared_platform.url, shared_platform.token) as opened:
        await opened.deploy(path)
        yield opened


async def test_what_is_triggered_appears_with_its_time_left_and_then_with_its_answer_without_a_reload(
    shared_platform: UpProcess, client: AsyncClient, show: Show, tmp_path: Path
) -> None:
    page = await show(shared_platform.url + "/", shared_platform.token)
    await page.evaluate("window.same = true")
    go = tmp_path / "go"
    run = await client.trigger("shots", str(go), deadline="50s")
    row = page.locator(f"#open li[data-key='{run.run_id}']")
    await expect(row).to_contain_text("analyse_shot running, 50 %, waiting for the shot")

    # The question of five seconds, from the accessibility tree alone: which run, where, in time or not, how long.
    heard = await page.locator("main").aria_snapshot()
    assert re.search(
        r"on time Run on route\n\s+- strong: shots\n\s+- text: \": due in\"\n\s+- strong: \d\d s", heard
    ), heard
    assert re.search(r"listitem: on time shots analyse_shot running.* \d\d s left of 50 s", heard), heard

    go.touch()
    ended = page.locator(f"#ended li[data-key='{run.run_id}']")
    await expect(ended).to_contain_text(re.compile("on time shots .* to spare"))
    await expect(row).to_have_count(0)
    await expect(ended.get_by_role("img")).to_have_accessible_name(re.compile("^mostly run, "))
    await ended.locator("summary").click()
    await expect(ended.get_by_role("region", name="Answer")).to_have_text('{\n  "q95": 4.1\n}')
    await expect(page.get_by_role("list", name="Routes")).to_contain_text("shots to analyse_shot, within 1h")
    assert await page.evaluate("window.same")


async def test_an_answer_of_a_cheaper_variant_is_told_as_such_until_the_full_one_is_there(
    shared_platform: UpProcess, client: AsyncClient, show: Show, tmp_path: Path
) -> None:
    page = await show(shared_platform.url + "/", shared_platform.token)
    run = await client.trigger("looks", str(tmp_path / "go"))
    flying = page.locator("#open li", has_text="looks")
    await expect(flying).to_contain_text("answered at level 1 of 1 by glance, a better answer is on its way")
    (tmp_path / "go").touch()
    row = page.locator("#ended li", has_text="looks")
    await expect(row.locator(".word")).to_have_text("on time")
    await expect(row.locator(".spare")).not_to_contain_text("level")
    await row.locator("summary").click()
    await expect(row.locator(".answer")).to_have_text('"4.1"')
    assert (await run.ended()).fidelity is not None


async def test_an_error_of_user_code_is_shown_as_the_text_that_it_is(
    shared_platform: UpProcess, client: AsyncClient, show: Show
) -> None:
    page = await show(shared_platform.url + "/", shared_platform.token)
    run = await client.trigger("spoiled", HOSTILE)
    ended = page.locator(f"#ended li[data-key='{run.run_id}']")
    await expect(ended).to_contain_text(re.compile("failed spoiled .* user: .*" + re.escape(HOSTILE)))
    await ended.locator("summary").click()
    await expect(ended.get_by_role("region", name="Error")).to_contain_text(HOSTILE)
    assert await page.locator("img").count() == 0


# ---------------------------------------------------------------- what it says


async def test_the_page_tells_which_run_is_the_most_urgent_and_whether_it_is_on_time(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    await expect(page.locator("#says")).to_have_text("No runs yet.")
    stage.accept("slow", due_in_s=500)
    stage.accept("crystals", due_in_s=90)
    stage.accept("whenever", due_in_s=None)
    await expect(page.locator("#sentence")).to_have_text(
        re.compile(r"^on time Run on route crystals: due in (1 min 2\d s|1 min 1\d s)$")
    )
    await expect(page.locator("#open .route")).to_have_text(["crystals", "slow", "whenever"])


async def test_a_run_past_its_deadline_is_called_late_in_words(stage: Stage, show: Show) -> None:
    stage.accept("fusion", age_s=70, due_in_s=-10)
    page = await show(stage.url)
    await expect(page.locator("#sentence")).to_have_text(re.compile(r"^late Run on route fusion: was due \d+ s ago$"))
    await expect(page.locator("#open li")).to_contain_text("over")


async def test_a_run_with_a_tenth_of_its_time_left_is_called_at_risk(stage: Stage, show: Show) -> None:
    stage.accept("fusion", age_s=9_500, due_in_s=500)
    page = await show(stage.url)
    await expect(page.locator("#word")).to_have_text("at risk")


@pytest.mark.parametrize(("verdict", "said"), [("at_risk", ""), ("infeasible", "not expected in time")])
async def test_a_run_whose_quote_was_no_good_says_so_from_the_start(
    stage: Stage, show: Show, verdict: Verdict, said: str
) -> None:
    stage.accept("fusion", due_in_s=500, quote=Quote(verdict=verdict, p50_s=6.0, p90_s=7.0))
    stage.accept("alerts", due_in_s=600, quote=Quote(verdict="on_track", p50_s=6.0, p90_s=7.0))
    page = await show(stage.url)
    fusion, alerts = page.locator("#open li").nth(0), page.locator("#open li").nth(1)
    await expect(fusion).to_contain_text(re.compile(f"at risk fusion .*{said}"))
    await expect(alerts).to_contain_text("on time alerts")
    await expect(alerts).not_to_contain_text("not expected")


async def test_a_run_is_shown_where_it_is_and_then_with_its_result_without_a_reload(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    await page.evaluate("window.same = true")
    work = stage.accept("fusion")
    await expect(page.locator("#open li")).to_contain_text("analyse waits for a worker")
    stage.start(work)
    stage.note(work, "flux surfaces", 0.25)
    await expect(page.locator("#open li")).to_contain_text("analyse running, 25 %, flux surfaces")
    stage.end(work)
    await expect(page.locator("#ended li")).to_contain_text(re.compile(r"on time fusion .* to spare"))
    await expect(page.locator("#open li")).to_have_count(0)
    await expect(page.locator("#sentence")).to_contain_text("done Run on route fusion: answered in")
    await expect(page.get_by_role("img", name="mostly run")).to_be_visible()
    assert await page.evaluate("window.same")


async def test_a_run_shows_the_batch_job_that_it_waits_for(stage: Stage, show: Show) -> None:
    records = [*succeed(submit(then="collect"), of=stage.accept("campaign"))[1]]
    job = job_of(records)
    for record in (*records, submission(job, "4711")):
        stage.log.put(record.subject, record.body)
    page = await show(stage.url)
    await expect(page.locator("#open li")).to_contain_text("job 4711 is in the queue of lab, 1 of 2 done")
    stage.log.put(*beginning(job)[:2])
    await expect(page.locator("#open li")).to_contain_text("job 4711 running at lab, ")


async def test_a_job_is_told_with_its_site_and_how_that_is(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    records = [*succeed(submit(then="collect"), of=stage.accept("campaign", due_in_s=None))[1]]
    for record in records:
        stage.log.put(record.subject, record.body)
    row, bar = page.locator("#open li"), page.locator("#open .fill")
    await expect(row).to_contain_text("job waits for lab, 1 of 2 done")
    site = SiteRecord(
        name="lab", kind="slurm", at=time.time(), since=0.0, status="down", detail="its agent says nothing"
    )
    await stage.tables.sites.put("lab", site)
    await expect(row).to_contain_text("job waits for lab (down), ")
    job = job_of(records)
    report = Report(
        run_id=job.run_id, invocation_id=job.invocation_id, site="lab", event="progress", at=1.0, fraction=0.5
    )
    for record in (
        submission(job, "4711"),
        beginning(job),
        Record(report_subject(job.run_id, job.invocation_id, "lab"), encode(report)),
    ):
        stage.log.put(record.subject, record.body)
    await expect(row).to_contain_text("job 4711 running at lab (down), 1 of 2 done, 50 %")
    await expect(bar).to_have_css(
        "transform", "matrix(0.5, 0, 0, 1, 0, 0)"
    )  # without a deadline it shows how far it is


async def test_the_answer_is_fetched_when_a_row_is_opened_and_not_before(
    stage: Stage, show: Show, watched: list[Watched]
) -> None:
    stage.end(stage.accept(), result=b'{"safe":true,"note":"<b>bold</b>"}')
    page = await show(stage.url)
    await expect(page.locator("#ended li")).to_have_count(1)
    assert not any(url.endswith("/result") for url in watched[0].requests)
    await page.locator("summary").click()
    await expect(page.get_by_role("region", name="Answer", exact=True)).to_have_text(
        '{\n  "safe": true,\n  "note": "<b>bold</b>"\n}'
    )


async def test_an_answer_is_laid_out_and_not_changed(stage: Stage, show: Show) -> None:
    answer = (
        '{"id":12345678901234567890,"q":[1.0,-2e-3,"a ] b,c"],"grid":[[1,2],[3,4]],"none":[],"of":{},'
        '"deep":{"k:,":[{"x":null}]},"quote":"\\" [1, 2]\\n<b>"}'
    )
    stage.end(stage.accept(), result=answer.encode())
    page = await show(stage.url)
    await page.locator("summary").click()
    region = page.get_by_role("region", name="Answer", exact=True)
    await expect(region).to_contain_text("12345678901234567890")
    shown = await region.inner_text()
    assert shown.splitlines()[:6] == [
        "{",
        '  "id": 12345678901234567890,',
        '  "q": [1.0, -2e-3, "a ] b,c"],',
        '  "grid": [',
        "    [1, 2],",
        "    [3, 4]",
    ]
    assert json.loads(shown) == json.loads(answer)


async def test_a_large_answer_is_cut_and_the_way_to_all_of_it_is_told(stage: Stage, show: Show) -> None:
    work = stage.accept()
    stage.end(work, result=b'"' + b"x" * 50_000 + b'"')
    page = await show(stage.url)
    await page.locator("summary").click()
    await expect(page.locator("#ended .body")).to_contain_text(
        f"The first 20 kB. All of it: headrace result {work.run_id}"
    )
    assert len(await page.get_by_role("region", name="Answer", exact=True).inner_text()) == 20_000


async def test_an_error_that_is_markup_is_shown_as_text(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    work = stage.accept("hits")
    stage.start(work)
    stage.note(work, HOSTILE, 0.5)
    await expect(page.locator("#open li")).to_contain_text(HOSTILE)
    stage.end(work, error=ErrorInfo(kind="user", message=HOSTILE))
    await expect(page.locator("#ended li")).to_contain_text(f"user: {HOSTILE}")
    await page.locator("summary").click()
    await expect(page.get_by_role("region", name="Error")).to_have_text(f"user: {HOSTILE}")
    await expect(page.locator("#more")).to_contain_text(HOSTILE)
    assert await page.locator("img").count() == 0


async def test_what_comes_in_goes_out_and_fails_is_counted(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    works = [stage.accept() for _ in range(5)]
    for work in works[:3]:
        stage.end(work)
    stage.end(works[3], error=ErrorInfo(kind="user", message="broken"))
    for name, count in (("in", 5), ("out", 4), ("failed", 1)):
        await expect(page.locator(f"#rate-{name}")).to_have_text(str(count))


# ---------------------------------------------------------------- the door


async def test_a_wrong_token_is_refused_with_the_way_to_the_right_one(
    stage: Stage, browser: Browser, watched: list[Watched]
) -> None:
    page = await (await browser.new_context()).new_page()
    watched.append(Watched(page))
    await page.goto(f"{stage.url}#token=wrong")
    door = page.get_by_role("form", name="Token not accepted")
    await expect(door).to_contain_text("cat .headrace/token")
    assert watched[0].errors == ["Failed to load resource: the server responded with a status of 401 (Unauthorized)"]
    watched[0].errors.clear()
    await page.keyboard.type(f" {TOKEN} ")  # the field has the focus; what is pasted often brings spaces along
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("status")).to_have_text("Live")


async def test_without_a_token_nothing_is_asked_of_the_platform(
    stage: Stage, browser: Browser, watched: list[Watched]
) -> None:
    page = await (await browser.new_context()).new_page()
    watched.append(Watched(page))
    await page.goto(stage.url)
    await expect(page.get_by_label("Token", exact=True)).to_be_focused()
    assert not any("/v1/" in url for url in watched[0].requests)


async def test_the_token_leaves_the_address_and_lives_as_long_as_the_tab(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    assert page.url == stage.url
    assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    await page.reload()
    await expect(page.get_by_role("status")).to_have_text("Live")


# ---------------------------------------------------------------- staying alive


async def test_a_lost_connection_is_told_and_made_good_without_a_gap(
    stage: Stage, show: Show, watched: list[Watched]
) -> None:
    page = await show(stage.url)
    work = stage.accept("fusion")
    await expect(page.locator("#open li")).to_have_count(1)
    await stage.close()
    await expect(page.get_by_role("status")).to_contain_text("Reconnecting")
    stage.end(work)
    stage.end(stage.accept("meanwhile"))
    await stage.open()
    await expect(page.get_by_role("status")).to_have_text("Live")
    await expect(page.locator("#ended .route")).to_have_text(["meanwhile", "fusion"])
    await expect(page.locator("#rate-in")).to_have_text("2")
    watched[0].errors[:] = [e for e in watched[0].errors if "net::ERR_" not in e]


async def test_a_run_whose_end_was_missed_is_asked_for(stage: Stage, show: Show) -> None:
    work = stage.accept("fusion")
    stage.start(work)
    stage.reader.lag_at = len(stage.log.stored)
    stage.end(work)  # too late for the read model, and too early for a page that is opened now
    page = await show(stage.url)
    await expect(page.locator("#ended li")).to_have_count(1)
    await expect(page.locator("#open li")).to_have_count(0)


async def test_without_the_read_model_the_page_says_so_and_follows_what_happens(
    stage: Stage, browser: Browser, watched: list[Watched]
) -> None:
    stage.end(stage.accept("before"))
    stage.reader.away = True
    page = await (await browser.new_context()).new_page()
    watched.append(Watched(page))
    await page.goto(f"{stage.url}#token={TOKEN}")
    await expect(page.get_by_role("status")).to_have_text("Live, earlier runs cannot be read now")
    stage.end(stage.accept("after"))
    await expect(page.locator("#ended .route")).to_have_text(["after"])
    stage.reader.away = False
    await expect(page.locator("#ended .route")).to_have_text(["after", "before"])
    await expect(page.get_by_role("status")).to_have_text("Live")
    watched[0].errors[:] = [e for e in watched[0].errors if "503" not in e]


async def test_thousands_of_runs_leave_the_page_small_and_the_urgent_run_on_top(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    stage.accept("urgent", due_in_s=100)
    for _ in range(1_000):
        stage.end(stage.accept("burst"))
    for _ in range(1_000):
        stage.accept("backlog", due_in_s=1_000)
    stage.end(stage.accept("last"))
    await expect(page.locator("#rate-in")).to_have_text("2002")
    await expect(page.locator("#rate-out")).to_have_text("1001")
    await expect(page.locator("#ended .route").first).to_have_text("last")
    await expect(page.locator("#says")).to_contain_text("Run on route urgent")
    await expect(page.locator("#flight-count")).to_have_text(re.compile(r"^over 1\d\d$"))
    assert await page.locator("#open li").count() <= 25
    assert await page.locator("#ended li").count() <= 15


async def test_a_paused_page_stands_still_and_then_catches_up(stage: Stage, show: Show) -> None:
    stage.accept("fusion")
    page, other = await show(stage.url), await show(stage.url)
    await expect(page.locator("#open li")).to_have_count(1)
    await page.get_by_role("button", name="Pause").click()
    await expect(page.get_by_role("status")).to_contain_text("Paused at")
    before, others = await text_of(page, "main"), await text_of(other, "#says")
    for name in ("first", "second"):
        stage.end(stage.accept(name))
        await expect(other.locator("#ended .route").first).to_have_text(name)
    await expect(other.locator("#says")).not_to_have_text(others)  # a second has gone by
    assert await text_of(page, "main") == before
    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator("#ended .route")).to_have_text(["second", "first"])


async def test_a_row_that_is_being_read_stays_while_others_come(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    stage.end(stage.accept("read"))
    await page.locator("summary").click()
    await expect(page.get_by_role("region", name="Answer", exact=True)).to_contain_text("4.1")
    for _ in range(100):
        stage.end(stage.accept("burst"))
    await expect(page.locator("#rate-out")).to_have_text("101")
    await expect(page.locator("#ended .route", has_text="burst")).to_have_count(15)
    await expect(page.get_by_role("region", name="Answer", exact=True)).to_be_visible()


# ---------------------------------------------------------------- for everybody


async def test_everything_can_be_reached_and_used_with_the_keyboard(stage: Stage, show: Show) -> None:
    stage.end(stage.accept())
    page = await show(stage.url)
    await expect(page.locator("#ended li")).to_have_count(1)
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Pause")).to_be_focused()
    await page.keyboard.press("Tab")
    await expect(page.locator("summary")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("region", name="Answer", exact=True)).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("region", name="Answer", exact=True)).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_nothing_is_cut_off_at_any_width_and_both_colour_schemes_are_drawn(
    stage: Stage, show: Show, width: int, scheme: str
) -> None:
    stage.accept("a-route-with-a-name-as-long-as-names-may-be-and-that-is-64-chars")
    stage.end(stage.accept("hits"), error=ErrorInfo(kind="user", message="x" * 3_000))
    page = await show(stage.url, viewport={"width": width, "height": 700}, color_scheme=scheme)
    await expect(page.locator("#open li")).to_have_count(1)
    await page.locator("summary").click()
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", ground)[:3])
    assert (brightness > 600) is (scheme == "light")


async def test_bars_do_not_glide_for_those_who_want_less_motion(stage: Stage, show: Show) -> None:
    stage.accept()
    for wish, seconds in (("reduce", "0s"), ("no-preference", "1s")):
        page = await show(stage.url, reduced_motion=wish)
        await expect(page.locator(".fill")).to_have_count(1)
        assert await page.locator(".fill").evaluate("bar => getComputedStyle(bar).transitionDuration") == seconds


# ---------------------------------------------------------------- the modules


async def test_events_are_read_the_same_wherever_the_network_cuts_them(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    stream = (
        'retry: 1000\r\nid: 7\r\n\r\n: here\n\nevent: run\ndata: {"a":1}\n\n'
        "id: 9\nevent: log\ndata: x\ndata:y\n\nid: 10\ndata: half"
    )
    cut = """async ([text, size]) => {
        const { Cutter } = await import("/page/stream.js");
        const cutter = new Cutter(), found = [];
        for (let i = 0; i < text.length; i += size) found.push(...cutter.feed(text.slice(i, i + size)));
        return [found, cutter.lastId];
    }"""
    for size in range(1, len(stream) + 1):
        assert await page.evaluate(cut, [stream, size]) == [
            [{"event": "run", "data": '{"a":1}'}, {"event": "log", "data": "x\ny"}],
            "9",
        ]


async def test_durations_are_told_as_people_say_them(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    say = "async ([what, seconds]) => (await import('/page/time.js'))[what](seconds)"
    for what, seconds, words in (
        ("took", 0.00042, "0.42 ms"),
        ("took", 0.1234, "123 ms"),
        ("took", 1.234, "1.23 s"),
        ("took", 59.97, "1 min 00 s"),
        ("left", 0.4, "under 1 s"),
        ("left", 42.9, "42 s"),
        ("left", 125, "2 min 05 s"),
        ("left", 3_780, "1 h 03 min"),
        ("given", 60, "1 min"),
        ("given", 0.5, "500 ms"),
        ("given", 5_400, "1 h 30 min"),
    ):
        assert await page.evaluate(say, [what, seconds]) == words


# ---------------------------------------------------------------- sites


async def test_sites_are_there_as_they_are(stage: Stage, show: Show) -> None:
    page = await show(stage.url)
    await expect(page.locator("#places")).to_be_hidden()
    row = SiteRecord(name="lab", kind="slurm", at=time.time(), since=0.0, gpus_total=16, gpus_free=5, jobs_waiting=7)
    await stage.tables.sites.put("lab", row)
    await expect(page.locator("#sites")).to_have_text("lab up, 5 of 16 GPUs free, 7 jobs waiting")
    changed = structs.replace(row, at=row.at + 1.0, status="down", detail=HOSTILE, gpus_free=0)
    await stage.tables.sites.put("lab", changed)
    await expect(page.locator("#sites")).to_have_text(f"lab down, {HOSTILE}")
