"""Which tests take long (`make test` leaves them to `make test-all`, and two to `make campaign` and `make slurm`), and
what several files train on."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

SLOW = {  # file: its tests, or all of them
    "test_notebooks": {"test_notebook"},
    "test_batch": None,
    "test_files": {"test_a_run_by_torchrun", "test_a_profile_with_a_teacher_from_a_file"},
    "test_queue": None,
    "test_site": None,
    "test_package": None,
    "test_jupyterlab": None,
    "test_cluster": {"test_the_job_array_trains_its_task_in_a_notebook"},
    "test_slurm": {"test_a_preempted_and_a_killed_job_leave_the_same_records"},
    "test_evidence": {"test_tables_and_figures_are_made_again", "test_open_questions_without_any_record"},
    "test_bench": {
        "test_a_measurement_is_kept_until_repeated",
        "test_tables_and_figures_follow_from_the_measurements",
        "test_small_benchmarks_leave_files_tables_and_figures",
    },
    "test_claims": {"test_front_page_with_a_few_paper_records", "test_front_page_without_any_record"},
    "test_cards": {"test_the_command_lists_and_checks", "test_verify_checks_the_teachers", "test_the_command_on_files"},
    "test_runs": {"test_killed_paused_or_undisturbed_the_weights_are_the_same", "test_two_processes_make_one_teacher"},
    "test_tune": {"test_killed_lost_or_undisturbed_the_trials_are_the_same", "test_two_processes_share_a_study"},
    "test_kernels": {"test_compiles_for_nvidia_without_spilling"},
    "test_preflight": {"test_terminals_without_our_letters"},
    "test_outcomes": {"test_tables_say_diverged"},
    "test_records": {"test_the_commands_name_the_odd_one_and_continue"},
    "test_methods": {"test_a_method_trains_and_resumes"},
    "test_distill": {
        "test_from_a_folder_to_the_report",
        "test_the_card_s_lines_load_the_student",
        "test_a_second_call_trains_nothing_and_other_settings_are_refused",
        "test_an_interrupted_training_resumes_with_the_same_result",
        "test_a_teacher_of_timm_in_a_file",
    },
    "test_extension": {
        "test_it_trains_resumes_and_is_tabulated_through_papermill",
        "test_one_file_each_trains_resumes_and_is_tabulated",
        "test_the_other_checks_still_pass",
    },
}


def pytest_configure():
    """Stop before anything is collected if the list names a test that does not exist."""
    for module, slow in SLOW.items():
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        missing = sorted((slow or set()) - set(re.findall(r"^def (\w+)", source, re.M)))
        if missing:
            raise pytest.UsageError(f"tests/conftest.py: {missing} not found in {module}.py; correct the names in SLOW")


def pytest_collection_modifyitems(config, items):
    by_name = [item for item in items if item.get_closest_marker("campaign")]
    if by_name and "LDRLD_CAMPAIGN" not in os.environ:
        config.hook.pytest_deselected(items=by_name)
        items[:] = [item for item in items if item not in by_name]
    for item in items:
        module, function = item.path.stem, item.originalname
        if module in SLOW and (SLOW[module] is None or function in SLOW[module]):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def digits():
    """200 training images of handwritten digits, and all test images."""
    import torch

    from ldrld import data

    torch.set_num_threads(1)
    whole = data.load("digits")
    return replace(whole, train_images=whole.train_images[:200], train_labels=whole.train_labels[:200])


@pytest.fixture(scope="module")
def teacher(digits):
    """An untrained resnet14 with a table of its logits for three epochs of these images."""
    import torch

    from ldrld import models
    from ldrld.data.augmentation import Crops, draw
    from ldrld.training.teacher import TeacherLogits

    torch.manual_seed(1)
    network = models.build("resnet14", 10)
    crops = Crops(digits.train_images, digits.mean, digits.std, digits.padding, digits.flip)
    table = TeacherLogits(network, crops, 10, resident=True)
    for epoch in range(1, 4):
        table.ahead(*draw(0, epoch, crops.n, crops.per_image))
    return table
