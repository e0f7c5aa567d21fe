"""Properties of a comparison's files: what they hold, and that the page draws, sorts and stays at home."""

import csv
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from comparisons import ERROR, make_comparison
from ewavit.compare.arms import Arm
from ewavit.compare.report import write_results
from ewavit.compare.results import ArmRuns, Comparison, Run
from ewavit.compare.statistics import Summary, summarise
from ewavit.compare.text import as_text

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
ARMS = ("dense", "dense-lr", "ema", "rup", "full", "ewa")
FAILED = {("ema", 1): "RuntimeError: loss is nan"}
COMPARISON = make_comparison(ARMS, seeds=3, epochs=6, layers=2, failed=FAILED)
HOSTILE = "</script><script>broken=1</script><img src=x onerror=broken=1>&amp;{{data}}\"'"


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(COMPARISON)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The files of COMPARISON, for tests that only look at them."""
    folder = tmp_path_factory.mktemp("results") / "new" / "folder"
    write_results(COMPARISON, folder)
    return folder


@pytest.fixture
def opened(browser):
    """Opens the report in a folder; a word on the console or on the network fails the test."""
    problems = []
    contexts = []

    def open_report(folder: Path, width: int = 1280, **settings):
        address = (folder / "report.html").as_uri()
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on(
            "request", lambda request: request.url != address and problems.append(f"asked: {request.url}")
        )
        page.goto(address)
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert not problems


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def count(page, selector: str) -> int:
    return page.locator(selector).count()


def column(page, number: int) -> list[str]:
    return [row.split("\t")[number] for row in page.locator("#table tbody").inner_text().splitlines()]


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_csv_has_one_row_per_arm_and_seed(written):
    rows = read_csv(written)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, str(seed)) for arm in ARMS for seed in range(3)
    ]
    assert list(rows[0]) == [
        "arm", "role", "seed", "lr", "top1", "mean_class", "eval_loss", "seconds", "images",
        "peak_memory_mib", "time_to_dense", "error",
    ]  # fmt: skip
    last = COMPARISON.arms[-1].runs[-1]
    assert float(rows[-1]["top1"]) == last.metric
    assert (rows[-1]["role"], rows[-1]["images"]) == ("method", str(last.curve[-1].images))
    failed = next(row for row in rows if row["error"])
    assert (failed["arm"], failed["seed"], failed["top1"]) == ("ema", "1", "")


def test_json_holds_curves_and_statistics_and_nan_is_null(tmp_path):
    dense = COMPARISON.arms[0]
    point = replace(dense.runs[0].curve[-1], eval_loss=math.nan)
    diverged = replace(dense.runs[0], curve=(*dense.runs[0].curve[:-1], point), peak_memory_mib=math.nan)
    dense = replace(dense, runs=(diverged, *dense.runs[1:]))
    comparison = replace(COMPARISON, arms=(dense, *COMPARISON.arms[1:]))
    write_results(comparison, tmp_path)
    text = (tmp_path / "results.json").read_text()
    held = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert held["command"] == comparison.command
    assert held["recipe"] == comparison.recipe
    assert held["statistics"] == summarise(comparison).as_dict()
    assert held["judge"] == {
        "column": "top1", "name": "top-1", "unit": "%", "difference_unit": "points", "higher_is_better": True,
        "bounds": [0, 100], "share_of_samples": True, "digits": 2, "rounding": 2e-4,
    }  # fmt: skip
    assert held["samples"] == 2000
    assert {pair["step"] for pair in held["statistics"]["against"]["dense"]} == {0.05}
    run = held["arms"][0]["runs"][0]
    assert run["curve"][-1]["eval_loss"] is run["eval_loss"] is run["peak_memory_mib"] is None
    ewa = comparison.arms[-1].runs[2]
    assert held["arms"][-1]["runs"][2]["curve"][3]["spread"] == ewa.curve[3].spread
    assert held["arms"][-1]["runs"][2]["curve"][3]["top1"] == ewa.curve[3].metric
    assert "predictions" not in text
    assert "labels" not in text


def test_failed_write_leaves_the_former_files_alone(tmp_path, monkeypatch):
    write_results(make_comparison(("dense", "ewa"), seeds=2, epochs=3), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["report.html", "results.csv", "results.json"]
    write_text = Path.write_text

    def full_disk(path, text, **settings):
        write_text(path, text[: len(text) // 2], **settings)
        if "report" in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_results(make_comparison(("dense", "ema"), seeds=2, epochs=3), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_plot_draws_its_marks(opened, written):
    page = opened(written)
    methods = 3
    assert count(page, "#differences .seed") == 5 * 3 - 1
    assert count(page, "#differences .mean") == count(page, "#differences .interval") == 5
    assert count(page, "#differences .zero") == 1
    assert count(page, "#curves .line[data-name]") == 6
    assert count(page, "#curves .band[d^='M'][d$='Z']") == 6
    assert count(page, "#cost .seed") == 6 * 3 - 1
    assert count(page, "#cost .mean") == 6
    reached = [row for row in read_csv(written) if row["time_to_dense"]]
    assert count(page, "#time .seed") == len(reached) > 3
    assert count(page, "#spread .line[d^='M']") == methods * 2
    assert count(page, "#spread .predicted[d^='M']") == methods
    assert count(page, "#share .line[data-name]") == methods
    assert count(page, "#rate .line[data-name]") == 6
    images = page.locator("main svg[role=img]")
    assert images.count() == 7 + methods
    assert all(len(images.nth(i).get_attribute("aria-label")) > 20 for i in range(images.count()))


def test_forest_plot_draws_differences_to_scale(opened, written, summary):
    page = opened(written)

    def places(selector: str) -> list[float]:
        """Middles of the marks in pixels right of the zero line."""
        middles = "all => all.map(e => e.getBoundingClientRect()).map(box => box.x + box.width / 2)"
        zero = page.locator("#differences .zero").evaluate_all(middles)[0]
        return [middle - zero for middle in page.locator(f"#differences {selector}").evaluate_all(middles)]

    for reference, pairs in summary.against.items():
        page.locator("#against").select_option(reference)
        means = [pair.mean for pair in pairs]
        scale = places(".mean")[3] / means[3]
        assert scale > 50
        assert places(".mean") == pytest.approx([scale * mean for mean in means], abs=1.5)
        each = [scale * difference for pair in pairs for difference in pair.differences]
        assert places(".seed") == pytest.approx(each, abs=1.5)
        for outcome in ("#differences", "#losses"):
            label = page.locator(f"{outcome} svg").get_attribute("aria-label")
            assert f"against {reference}" in label
            assert all(f"{pair.arm} " in label for pair in pairs)
    assert f"{summary.best_control}, the best control" in page.locator("#against").inner_text()


def test_table_shows_the_statistics_and_sorts_both_ways_by_click_and_key(opened, written, summary):
    page = opened(written)
    assert column(page, 0) == list(ARMS)
    assert column(page, 4) == [f"{arm.mean:.2f}" for arm in summary.arms]
    head = page.locator("#table thead th", has_text="mean")
    mean = head.locator("button")
    mean.click()
    assert column(page, 4) == sorted(column(page, 4))
    assert head.get_attribute("aria-sort") == "ascending"
    mean.press("Enter")
    assert column(page, 4) == sorted(column(page, 4), reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#table thead button", has_text="arm").press("Space")
    assert column(page, 0) == sorted(ARMS)
    assert count(page, "#table [aria-sort]") == 1
    for _ in range(2):  # what has no value stays last, up and down
        page.locator("#table thead button", has_text="difference").first.click()
        assert column(page, 0)[-1] == "dense"


def test_legend_hides_an_arm_in_every_figure_and_brings_it_back(opened, written):
    page = opened(written)
    selectors = ["#curves .line[data-name]", "#cost .mean", "#share .line", "#rate .line"]
    button = page.locator("#legend button", has_text="ewa")
    before = [count(page, selector) for selector in selectors]
    button.press("Space")
    assert button.get_attribute("aria-pressed") == "false"
    assert [count(page, selector) for selector in selectors] == [number - 1 for number in before]
    assert count(page, "#curves [data-name=ewa]") == 0
    assert count(page, "#spread svg") == 2
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert [count(page, selector) for selector in selectors] == before
    for every in page.locator("#legend button").all():
        every.click()
    assert count(page, "#curves svg") == 0


def test_marks_are_told_to_pointer_and_keyboard_and_as_a_table(opened, written):
    page = opened(written)
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("#differences svg").focus()
    page.keyboard.press("ArrowDown")
    assert tip.inner_text().startswith("ema")
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator("#curves svg").hover(position={"x": 60, "y": 60})
    assert tip.inner_text().startswith("2,000 images")
    assert all(arm in tip.inner_text() for arm in ARMS)
    page.locator("#curves summary").press("Enter")
    page.locator("#curves tbody tr").last.wait_for()  # the page fills it when told that it is open
    assert count(page, "#curves tbody tr") == 6


def test_switches_change_what_is_drawn(opened, written):
    page = opened(written)
    page.locator("#unit button", has_text="memory").click()
    assert "peak memory" in page.locator("#cost svg").get_attribute("aria-label")
    whole = page.locator("#curves .line").first.get_attribute("d")
    page.locator("#span button").last.press("Enter")
    assert page.locator("#curves .line").first.get_attribute("d").count("L") < whole.count("L")


def test_theme_follows_the_system_and_the_button(opened, written):
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened(written, color_scheme="light")
    dark = opened(written, color_scheme="dark")
    assert light.evaluate(background) != dark.evaluate(background)
    by_system = dark.evaluate(background)
    light.locator("#theme").press("Enter")
    assert light.evaluate(background) == by_system


def test_page_says_the_verdict_the_command_and_what_failed(opened, written, summary):
    page = opened(written)
    said = [page.locator(name).inner_text() for name in ("#verdict", "#setting")]
    claim, setting = (text.replace("\u00a0", " ").replace("−", "-") for text in said)
    assert (claim, setting) == (summary.claim, f"{summary.setting}.")
    assert page.locator(".badge").count() == 0
    assert page.locator("#command").inner_text() == COMPARISON.command
    assert "ema, seed 1\nRuntimeError: loss is nan" in page.locator("#failed").inner_text()
    assert page.locator("#tuning .chosen").inner_text() == "82.60"


def test_page_says_the_step_of_the_metric(opened, written):
    said = opened(written).locator("#reading").inner_text().replace("\n", " ")
    assert "The top-1 of 2,000 images comes in steps of 0.05 points. No interval is narrower." in said


def test_no_p_value_is_printed_as_zero(tmp_path):
    comparison = make_comparison(("dense", "ewa"), seeds=8, epochs=2, gains={"ewa": 9})
    assert 0 < summarise(comparison).against_reference[0].holm_p < 0.0005
    lines = as_text(comparison, tmp_path).splitlines()
    assert next(line for line in lines if line.startswith("ewa ")).split()[-2] == "<0.001"


def test_text_of_runs_that_failed_has_no_nan(tmp_path):
    failed = {("ewa", 0): "x", ("rup", 0): "x", ("rup", 1): "x"}
    text = as_text(make_comparison(("dense", "ewa", "rup"), 2, failed=failed), tmp_path)
    assert "nan" not in text
    assert re.search(r"^ewa  +8\d\.\d\d %  +[+-]\d\.\d\d, no interval  +-  ", text, re.MULTILINE)
    assert re.search(r"^rup  +-  +-  +-  +-  +-$", text, re.MULTILINE)


def test_quick_look_is_marked(opened, tmp_path):
    write_results(
        make_comparison(("dense", "ewa"), seeds=2, epochs=3, command="ewavit compare --limit 9"), tmp_path
    )
    assert opened(tmp_path).locator("header .badge").inner_text() == "quick look"


def comparisons() -> Iterator[tuple[str, Comparison]]:
    """What a real comparison may look like at its edges."""
    names = ("dense", *(f"arm-{i}-{'with-a-very-long-name-' * (i == 3)}" for i in range(11)))
    yield "twelve arms, 24 layers", make_comparison(names, seeds=2, epochs=4, layers=24)
    yield "one seed, epoch and layer", make_comparison(("dense", "ewa"), seeds=1, epochs=1, layers=1)
    yield "diverged", make_comparison(("dense", "ema", "ewa", "rup"), 2, 4, gains={"rup": -70})
    yield "an arm without a run", make_comparison(ARMS, 2, 4, failed={("ewa", 0): "a", ("ewa", 1): "b"})
    yield "dense without a run", make_comparison(("dense", "ewa"), 1, 4, failed={("dense", 0): "a" * 500})
    yield "no run at all", make_comparison(("dense", "ewa"), 1, failed={("dense", 0): "a", ("ewa", 0): "b"})
    yield "no control", make_comparison(("ewa", "rup"), 2, 4, tuning=())
    yield "dense alone", make_comparison(("dense",), 2, 4)
    points = tuple(replace(p, metric=math.nan, lr=math.nan) for p in make_comparison().arms[0].runs[0].curve)
    runs = tuple(Run(seed, points) for seed in range(2))
    healthy = make_comparison(("dense", "ewa"), 2, 4)
    yield "nan", replace(healthy, arms=(*healthy.arms, ArmRuns(Arm("nan"), math.nan, runs)))


@pytest.mark.parametrize("comparison", [pytest.param(made, id=name) for name, made in comparisons()])
def test_page_of_any_comparison_fits_a_phone_and_draws_numbers_only(opened, tmp_path, comparison):
    write_results(comparison, tmp_path)
    page = opened(tmp_path, width=360)
    assert overflow(page) == 0
    assert "NaN" not in page.locator("main").inner_html()
    assert "undefined" not in page.locator("body").inner_text()
    assert count(page, "#table tbody tr") == len(comparison.arms)
    page.set_viewport_size({"width": 1000, "height": 800})
    assert overflow(page) == 0


def test_page_of_point_clouds_does_not_speak_of_images(opened, tmp_path):
    write_results(make_comparison(ARMS, 2, 4, data="solids", kind="clouds"), tmp_path)
    page = opened(tmp_path)
    page.get_by_role("button", name="clouds", exact=True).click()
    said = page.locator("header").inner_html() + page.locator("main").inner_html()
    assert "training clouds" in said
    assert "test clouds" in said
    assert "images" not in said


def test_page_and_files_of_an_error_speak_of_it_and_call_less_better(opened, tmp_path):
    gains = {"ewa": -5, "rup": -5}
    comparison = make_comparison(ARMS, 3, 6, gains=gains, judge=ERROR, data="solids", kind="clouds")
    write_results(comparison, tmp_path)
    assert "chamfer" in read_csv(tmp_path)[0]
    held = json.loads((tmp_path / "results.json").read_text())
    assert held["arms"][0]["runs"][0]["chamfer"] == comparison.arms[0].runs[0].metric
    assert held["judge"]["higher_is_better"] is False
    page = opened(tmp_path)
    said = page.locator("header").text_content() + page.locator("main").text_content()
    labels = page.locator("main svg[role=img]").evaluate_all("all => all.map(e => e.ariaLabel).join()")
    wrong = "top-?1|accura|(?<!arrowhead )points|percent|images"
    assert not re.search(wrong, said + labels, re.IGNORECASE)
    assert "Chamfer distance during training" in said
    assert "Chamfer distance minus dense’s, mm" in said
    assert "better ←" in said
    assert page.locator("#tuning .chosen").inner_text() == "82.60"
    assert "the lowest mean Chamfer distance" in page.locator("#reading").inner_text().replace("\n", " ")
    assert "rup and ewa help;" in page.locator("#verdict").inner_text()
    assert held["samples"] is None
    assert "steps of" not in said
    page.locator("#curves svg").focus()
    page.keyboard.press("ArrowRight")
    told = page.locator("#tip div span:last-child").all_inner_texts()
    assert told == sorted(told)  # the best first


def test_hostile_names_and_errors_stay_text(opened, tmp_path):
    comparison = make_comparison(
        ("dense", HOSTILE), 2, 3, failed={(HOSTILE, 1): HOSTILE}, name=HOSTILE, recipe={HOSTILE: HOSTILE},
        command=HOSTILE, data=HOSTILE,
    )  # fmt: skip
    write_results(comparison, tmp_path)
    page = opened(tmp_path, width=360)
    assert page.evaluate("typeof broken") == "undefined"
    assert count(page, "img") == 0
    assert page.title().startswith(HOSTILE)
    assert page.locator("#name").inner_text() == HOSTILE
    assert column(page, 0)[1] == HOSTILE
    assert HOSTILE in page.locator("#failed code").inner_text()
    assert overflow(page) == 0
