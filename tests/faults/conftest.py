"""pytest tests/faults --table: each class of attack, and how many were tried, withstood, and went wrong.

An attack is withstood if it is refused as its test says, or does no harm. A test that tries several counts them with
record_property("attacks", number). The table has the most processor time that a test took, with its processes, and the
most memory that this process took for it, which macOS does not report.
"""

import re
import resource
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

PEAK = Path("/proc/self/clear_refs")
OUTCOMES = ("passed", "failed", "error")
# The classes of attack, by the test's file, or the test.
CLASSES = {
    "cache": "poisoned caches",
    "changed_weights": "weights that change in use",
    "comfyui": "quantized files of ComfyUI",
    "conversions": "kills, races and damage",
    "copies": "leaks through conversion",
    "flat": "absurd weights",
    "fuzz": "mutated input",
    "gguf": "malicious GGUF",
    "headers": "malicious headers",
    "hostile_loras": "malicious LoRAs",
    "ignored": "malicious headers",
    "images": "malicious images",
    "json": "malicious JSON",
    "lines": "endless text",
    "links": "links to other files",
    "many": "too many requests",
    "numbers": "absurd numbers",
    "process": "limits, signals, descriptors",
    "properties": "random values (Hypothesis)",
    "requests": "impossible requests",
    "rows": "damaged models",
    "sparse": "sparse files",
    "special_files": "FIFOs and devices",
    "terminal": "terminal escapes",
    "tokenizers": "malicious tokenizers",
    "test_hostile_latents_are_refused": "malicious latents",
    "test_a_sparse_file_of_latents_is_refused_before_it_is_read": "sparse files",
    "test_a_config_of_gigabytes_is_refused_by_its_size": "sparse files",
    "test_hostile_json_as_an_origin_is_refused": "malicious JSON",
    "test_weights_in_another_kind_of_file_are_refused": "damaged models",
    "test_a_manifest_names_only_files_in_its_folder": "links to other files",
    "test_a_listed_link_out_of_the_folder_is_a_fault_and_is_not_read": "links to other files",
    "test_a_link_planted_where_convert_writes_is_not_followed": "links to other files",
    "test_a_link_in_an_images_place_is_not_followed": "links to other files",
    "test_a_link_out_of_the_source_is_refused": "links to other files",
    "test_a_snapshot_of_the_hub_may_link_to_its_blobs_and_nowhere_else": "links to other files",
    "test_a_damaged_note_of_our_own_is_ignored": "poisoned caches",
    "test_a_cached_revision_is_one_of_its_snapshots": "poisoned caches",
    "test_a_full_disk_ends_with_exit_code_6": "limits, signals, descriptors",
    "test_a_reader_that_has_gone_causes_no_traceback": "limits, signals, descriptors",
    "test_a_second_interrupt_ends_at_once": "limits, signals, descriptors",
    "test_a_malicious_tokenizer_ends_in_exit_code_4": "malicious tokenizers",
}
# Tests of what is valid, or of the tests: they try no attack.
NOT_ATTACKS = re.compile(
    r"test_(valid_input|mutations_depend|nothing_is_opened|other_names|a_token_that|texts_that_only|reading_changes"
    r"|a_tokenizer_larger|a_header_of_the_largest|a_lora_of_zeros|patterns_that_are_names|a_head_and_a_last_layer"
    r"|a_full_size_model|the_longest_prompt|a_model_that_is_a_link|most_tokens|a_prompt_has_no_more|the_published"
    r"|without_limits|plain_text_keeps|prefixes_that|latents_of_every|sha256sum|verify_finds_no_fault"
    r"|an_image_that_shows|a_cached_array_records|the_next_run_resumes|no_file_is_opened_except)"
)


def pytest_addoption(parser):
    parser.addoption("--table", action="store_true", help="print a table of the attacks that were tried")


def processor_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def resident(field: str) -> int:
    """Bytes of memory: VmRSS, now, or VmHWM, the most since 5 was written to PEAK."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * int(lines[field].split()[0])


def class_of(file: str, test: str) -> str | None:
    """The class of attack of a test, if it tries any."""
    if NOT_ATTACKS.match(test):
        return None
    return CLASSES.get(test) or CLASSES[Path(file).stem.removeprefix("test_")]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            class_of(item.path.name, item.originalname)  # a missing class is found now, not at the end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not item.config.getoption("--table", False):
        return (yield)
    before, start = 0, processor_s()
    if PEAK.exists():
        PEAK.write_text("5")
        before = resident("VmRSS")
    try:
        return (yield)
    finally:
        used = resident("VmHWM") - before if PEAK.exists() else 0
        item.user_properties += [("seconds", processor_s() - start), ("bytes", used)]


def pytest_terminal_summary(terminalreporter):
    if not terminalreporter.config.getoption("--table", False):
        return
    counts: dict[str, Counter] = defaultdict(Counter)
    most: dict[str, Counter] = defaultdict(Counter)
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            own = class_of(report.location[0], report.location[2].partition("[")[0])
            if own is None:
                continue
            found = dict(report.user_properties)
            for kind in (own, "all"):
                counts[kind][outcome] += found.get("attacks", 1) if outcome == "passed" else 1
                for name in ("seconds", "bytes"):
                    most[kind][name] = max(most[kind][name], found.get(name, 0))
    terminalreporter.section("attacks")
    terminalreporter.line(f"{'class':30}{'tried':>8}{'withstood':>11}{'wrong':>7}{'slowest':>10}{'memory':>9}")
    for kind in sorted(counts, key=lambda kind: (kind == "all", kind)):
        tried, held = counts[kind].total(), counts[kind]["passed"]
        cost = f"{most[kind]['seconds']:8.1f} s{most[kind]['bytes'] / 1e6:6.0f} MB"
        terminalreporter.line(f"{kind:30}{tried:8}{held:11}{tried - held:7}{cost}")
