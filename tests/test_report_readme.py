"""The README's table of measurements: made from ladder.csv alone, put between two marks."""

from pathlib import Path

import pytest
from detr_profiling.pages.results import load_results
from detr_profiling.report import BEGIN, END, ReportOptions, main, readme_table

from detr_fast.config import UserError

PLACE = {"model": "detr_r50", "size": "320x427", "batch_size": "1", "threads": "2", "device": "AMD EPYC"}
PLACE |= {"torch": "2.11.0", "commit": "28d3f62", "date": "2026-11-25"}
HEAD = "mode,technique,median_ms,q1_ms,q3_ms,runs,images_per_second,speedup,peak_mib,error,allowed,quantity,close"
ROWS = (
    "training,reference,912.4,902.3,927.6,10,1.096,1,2104,3.1e-06,9.4e-06,logits,True",
    "training,compile,401.6,395.8,410.3,10,2.49,2.272,1238,0.014,0.026,gradients,False",
    "inference,a|b <i>,1294,1290,1300,10,0.77,1,902.4,nan,,,",
)
LADDER = "\n".join([",".join([HEAD, *PLACE]), *(",".join([row, *PLACE.values()]) for row in ROWS)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ladder.csv").write_text(LADDER)
    return tmp_path


def test_table(folder: Path) -> None:
    table = readme_table(load_results(folder))
    assert table.splitlines() == [
        "detr_r50, 320x427 px, batch size 1, training and inference: AMD EPYC, 2 threads, torch 2.11.0, 2026-11-25, "
        "commit 28d3f62.",
        "",
        "| step |  | ms (IQR, runs) | images/s | speedup over reference | peak MiB | error of | error | of allowed, % "
        "| verdict |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---|",
        "| training | reference | 912 (25, 10 runs) | 1.10 | 1.00 | 2,104 | logits | 3.1e-6 | 33 | close |",
        "| training | compile | 402 (14, 10 runs) | 2.49 | 2.27 | 1,238 | gradients | 0.014 | 54 | NOT close |",
        r"| inference | a\|b &lt;i> | 1,294 (10, 10 runs) | 0.770 | 1.00 | 902 | n/a | n/a | n/a | n/a |",
    ]
    assert str(folder) not in table, "a README must not depend on where the results lay"


def test_the_race_stands_above_the_ladder(folder: Path) -> None:
    race = LADDER.replace("training,reference", "training,hf-sdpa").replace("training,compile", "training,detr_fast")
    (folder / "race.csv").write_text(race)
    lines = readme_table(load_results(folder)).splitlines()
    named = [index for index, line in enumerate(lines) if "hf-sdpa" in line or "training | reference" in line]
    assert len(named) == 2 and "hf-sdpa" in lines[named[0]] and lines.count("") == 3
    main(ReportOptions(str(folder)))
    page = (folder / "report.html").read_text()
    assert "Comparison with baselines" in page and "hf-sdpa" in page


def test_the_readme_has_the_table_of_the_committed_results() -> None:
    checkout = Path(__file__).parents[1]
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0].lstrip("\n")
    assert shown == readme_table(
        load_results(checkout / "benchmarks" / "results" / "cpu_epyc_202611" / "comparison_and_ladder")
    )


def test_modes_from_two_days_are_named_apart(folder: Path) -> None:
    first, second, third = LADDER.rsplit("\n", 2)
    (folder / "ladder.csv").write_text("\n".join((first, second, third.replace("2026-11-25", "2026-12-01"))))
    lines = readme_table(load_results(folder)).splitlines()
    assert ", training: " in lines[0] and "2026-11-25" in lines[0]
    assert ", inference: " in lines[2] and "2026-12-01" in lines[2]


def test_table_stands_between_its_marks(folder: Path) -> None:
    readme = folder / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\nold | ü\n{END}\nafter ü\n", encoding="utf-8")
    for _ in range(2):
        main(ReportOptions(str(folder), readme=str(readme)))
        table = readme_table(load_results(folder))
        assert readme.read_text(encoding="utf-8") == f"# Title\n{BEGIN}\n{table}{END}\nafter ü\n"


@pytest.mark.parametrize(
    "text", ["", BEGIN, f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}\n"]
)
def test_readme_without_its_marks_stays_as_it_is(folder: Path, text: str) -> None:
    readme = folder / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match="measured: begin"):
        main(ReportOptions(str(folder), readme=str(readme)))
    assert readme.read_text() == text


def test_file_and_ladder_must_be_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"README\.md cannot be read"):
        main(ReportOptions(str(folder), readme=str(folder / "README.md")))
    (folder / "ladder.csv").unlink()
    with pytest.raises(UserError, match="python -m detr_profiling ladder"):
        readme_table(load_results(folder))
