"""Which tests provoke a message and then do what it says: for each file, part of the message's template → the tests.

A message of the program that is raised, or that advises something, must stand here (`test_table.py`), and a test that
stands here must provoke it (`reached.py`). A new message: write the test that follows its remedy, and name it here.
"""

from remedies.messages import Message

CONFIG = "tests/test_config.py::"
NAMES = f"{CONFIG}test_advice_finds_what_was_meant"
BETWEEN = f"{CONFIG}test_a_broken_rule_between_settings_is_one_line_and_following_it_helps"
CLI = "tests/remedies/test_command_line.py::"
COMMANDS = f"{CLI}test_a_command_that_is_corrected_as_it_is_told_works"
DATA = "tests/remedies/test_data.py::"
ROWS = f"{DATA}test_rows_that_are_corrected_are_read"
COMMAND_OF_FILE = f"{DATA}test_the_command_that_a_file_is_refused_with_makes_text_of_it"
PATHS = f"{DATA}test_paths_that_are_corrected_are_read"
PARQUET = f"{DATA}test_parquet_that_is_written_again_is_read"
SPLITS = f"{DATA}test_a_corpus_with_too_little_for_its_splits_gets_what_it_is_told"
PREPARED = f"{DATA}test_prepared_text_goes_on_as_it_is_told"
TOKENIZER = f"{DATA}test_a_tokenizer_that_cannot_be_used_is_replaced_as_told"
VOCABULARY = "tests/data/test_tokenizer.py::test_the_vocabulary_that_an_error_advises_works"
LOADER = f"{DATA}test_batches_of_the_size_that_is_advised"
DEVICES = "tests/planning/test_devices.py::"
SWEEP = "tests/runs/test_sweep.py::"
LADDER = "tests/runs/test_ladder.py::"
RUNS = "tests/remedies/test_runs.py::"
WORKDIRS = "tests/remedies/test_workdirs.py::"
FITS_NOT = f"{WORKDIRS}test_a_checkpoint_of_files_that_fit_but_arrays_that_do_not_is_removed_as_told"
NONE = f"{WORKDIRS}test_a_checkpoint_that_is_none_is_named"
CONFIG_BACK = f"{WORKDIRS}test_a_config_comes_back_by_the_command_that_is_told"
COPY = f"{WORKDIRS}test_a_tokenizer_or_settings_of_another_run_are_restored_from_a_copy"
WINDOWS = f"{WORKDIRS}test_damaged_windows_are_removed_as_told_and_made_again"
PASSED_OVER = f"{WORKDIRS}test_a_damaged_checkpoint_is_passed_over_or_restored"
LINKS = f"{WORKDIRS}test_what_is_a_link_or_too_long_is_put_right"
MENDED = f"{WORKDIRS}test_what_verify_finds_is_mended_as_it_says"
MACHINE = "tests/remedies/test_machine.py::"
MAKE = f"{MACHINE}test_what_is_advised_to_make_can_be_made"
BENCH = f"{RUNS}test_benchmarks_are_asked_for_as_it_is_told"
ENVIRONMENT = "tests/remedies/test_environment.py::"
CUT = "tests/data/test_token_files.py::test_a_damaged_manifest"
LIBRARY = f"{DATA}test_a_library_that_is_installed_as_told_reads"
USABLE = f"{ENVIRONMENT}test_a_path_that_is_corrected_as_told_can_be_used"
PERMITTED = f"{ENVIRONMENT}test_a_path_whose_permissions_are_changed_as_told_can_be_used"
HOME = f"{ENVIRONMENT}test_a_home_that_is_set_or_written_out_is_found"
DOCTOR = f"{ENVIRONMENT}test_what_the_doctor_finds_is_gone_when_it_is_done"
GOES_ON = "tests/runs/test_resume.py::test_the_script_goes_on_by_the_workdir_alone"
SESSION = "tests/inference/test_chat.py::"
SERVE = "tests/serve/test_remedies.py::"
BODY = f"{SERVE}test_a_request_that_is_corrected_as_told_is_answered"
SHORTER = f"{SERVE}test_a_text_that_is_shortened_as_told_is_read"
SENT = f"{SERVE}test_a_body_is_sent_as_told"
NAMED = f"{SERVE}test_a_model_that_is_named_as_told_answers"
LACKING = f"{SERVE}test_what_a_workdir_lacks_is_done_without"
CONVERT = "tests/convert/"
THEIRS = f"{CONVERT}test_huggingface.py::test_a_config_json_that_is_not_supported"
FOLDER = f"{CONVERT}test_huggingface.py::test_a_folder_that_lacks_something"
SOUND = f"{CONVERT}test_safetensors_files.py::test_a_file_that_is_not_sound"
LONG_HEADER = f"{CONVERT}test_safetensors_files.py::test_a_header_longer_than_the_file"
INDEX = f"{CONVERT}test_safetensors_files.py::test_an_index_that_is_not_sound"
NO_TOKENIZER_JSON = f"{CONVERT}test_tokenizer_json.py::test_models_that_no_tokenizer_json_can_hold"
NO_GGUF = f"{CONVERT}test_gguf.py::test_what_llama_cpp_cannot_be_told"
JSON_TOKENIZER = "tests/data/test_json_tokenizer.py::test_files_that_are_none"
FINETUNE = "tests/runs/test_finetune.py::"
NO_BASE = f"{FINETUNE}test_what_cannot_be_a_base"
OTHER_BASE = f"{FINETUNE}test_another_base_is_refused_and_a_moved_one_found"
BASE_JSON = f"{FINETUNE}test_a_checkpoint_knows_its_base_without_the_file_that_names_it"
CONVERSATION = "tests/data/test_chat.py::test_what_is_no_conversation_is_named_with_its_line"
TEMPLATE = "tests/data/test_chat_template.py::"
REFUSED = f"{TEMPLATE}test_what_a_template_refuses_is_told_in_its_words"
HARM = f"{TEMPLATE}test_a_template_that_does_harm_is_one_line"
LIMITS = f"{TEMPLATE}test_the_limits_of_the_process_hold_in_it"
TASKS = "tests/evaluation/test_lm_eval.py::test_tasks_that_cannot_be_run"
TALK = "tests/inference/test_conversation.py::"
JOINING = "tests/hardware/test_joining.py::"
PLACES = f"{JOINING}test_a_place_that_is_corrected_as_told_is_one"
JOBS = f"{JOINING}test_a_job_of_several_never_becomes_a_smaller_run"
COUNTS = f"{JOINING}test_fewer_or_more_than_stated_are_refused"
PROCESSES = "tests/runs/test_processes.py::"
INTERNAL = "tests/remedies/test_runs.py::test_calls_of_python_are_corrected_as_they_are_told"

REMEDIES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "configs/finetune.py": {"is not a variant": NO_BASE},
    "configs/gpt2.py": {"is not a variant": f"{CLI}test_the_variants_that_are_named_exist"},
    "configs/m2_air.py": {"is not a variant": f"{CLI}test_the_variants_that_are_named_exist"},
    "configs/tales.py": {"is not a variant": f"{CLI}test_the_variants_that_are_named_exist"},
    "configs/wikitext2.py": {"is not a variant": f"{CLI}test_the_variants_that_are_named_exist"},
    "launch/": {
        "give {} before its settings": COMMANDS,
        "{}; write it as --name=value (see --help)": COMMANDS,
        "is not a flag: write every argument": COMMANDS,
        "no such file{}": COMMANDS,
        "did you mean {}?": COMMANDS,
        "try --{}={}": COMMANDS,
        "; there is {}": COMMANDS,
        "changes a setting of --{}": COMMANDS,
        "is missing: give": COMMANDS,
        "is a group of settings; set one of them": COMMANDS,
        "there is no such setting; {}": COMMANDS,
        "must be a file, and / at its end says folder": COMMANDS,
        "{}, as configs/tales.py": COMMANDS,
        "--{}={} {}": f"{ENVIRONMENT}test_the_path_of_a_flag_is_corrected_as_told",
        "did you mean --{}.{}?": COMMANDS,
        "it lacks {}; run `make env`": f"{ENVIRONMENT}test_the_environment_that_is_made_as_told_is_used",
        "cannot import {}": f"{ENVIRONMENT}test_a_library_that_is_missing_is_installed_as_told",
        "the current folder is gone": f"{ENVIRONMENT}test_from_a_folder_that_exists_a_script_runs",
        "unset it to go on": f"{ENVIRONMENT}test_a_variable_of_jax_that_is_unset_as_told_is_no_harm",
        "unset what is set": f"{ENVIRONMENT}test_a_variable_of_jax_that_is_unset_as_told_is_no_harm",
    },
    "launch/cluster/ray_train.py": {
        "ended with exit code": "tests/cluster/test_ray.py::test_a_run_goes_on_when_a_process_and_when_a_worker_ends",
    },
    "launch/train.py": {
        "holds no run to go on with": GOES_ON,
    },
    "tale_jax/hardware/coordinator.py": {
        "must have a port that is free": f"{JOINING}test_a_port_that_is_taken_is_named_and_another_one_serves",
    },
    "tale_jax/hardware/distributed.py": {
        "start all processes with the same flags": f"{PROCESSES}test_mistakes_are_told_in_one_line_by_all_processes",
    },
    "tale_jax/hardware/joining.py": {
        "launcher's processes are not found": f"{JOINING}test_a_launcher_that_is_not_understood_is_done_without",
        "is missing beside {}": PLACES,
        "be a whole number; give": f"{JOINING}test_a_number_that_is_none_is_named_with_its_variable",
        "coordinator_address": (PLACES, f"{JOINING}test_an_open_mpi_without_a_machine_takes_an_address"),
        "process_id; give": PLACES,
        "start as many": COUNTS,
        "mesh.processes": (COUNTS, JOBS),
        "SLURM_NTASKS={} tasks": JOBS,
        "JOB_COMPLETION_INDEX={} says": JOBS,
        "not all of the {} processes": f"{PROCESSES}test_a_process_that_does_not_come_is_an_error_within_a_minute",
        "the same command goes on from there": (
            "tests/faults/test_lost_processes.py::test_a_process_that_is_killed_ends_the_other_in_one_line"
        ),
    },
    "tale_jax/inference/chat.py": {
        "in the encoding of the terminal": (
            "tests/launch/test_interactive.py::test_a_pipe_of_prompts_with_a_line_that_is_no_text"
        ),
        "is not a command": f"{SESSION}test_a_bad_line_is_one_line_and_the_session_goes_on",
        "the model goes on from it": f"{SESSION}test_help_names_every_setting_and_its_value",
        "must be a whole number": f"{SESSION}test_a_bad_line_is_one_line_and_the_session_goes_on",
        "it stays {}, try": f"{SESSION}test_a_bad_line_is_one_line_and_the_session_goes_on",
    },
    "tale_jax/bench/compare.py": {
        "run it by itself": f"{RUNS}test_what_a_benchmark_could_not_run_can_be_run_by_itself",
        "--sweep={} must be": BENCH,
        "--peer={} must {}; {}": BENCH,
        "try --only=": BENCH,
        "let it print kind, mode and tokens_per_s": BENCH,
    },
    "tale_jax/bench/profile.py": {"--profile needs traces": BENCH},
    "tale_jax/bench/run.py": {"cannot be measured together": BENCH, "leave it out here": BENCH},
    "tale_jax/bench/throughput.py": {"--only={} must be": BENCH},
    "tale_jax/config.py": {
        "try {}": BETWEEN,
        "try --config.lora.matrices=query,value": BETWEEN,
        "set --config.lora.rank=8": BETWEEN,
        "leave out --config.{}": NO_BASE,
        "try ag_news": BETWEEN,
        "try train": BETWEEN,
        "try --config.corpus.path=my-texts/": f"{RUNS}test_the_folder_that_an_example_names_is_read",
        "try --config.corpus.changed=continue": BETWEEN,
        "try 4096": BETWEEN,
        "give heads of an even width": BETWEEN,
        "set --config.model.induction_init=True": BETWEEN,
        "set --config.model.num_heads=2": BETWEEN,
        "set --config.model.num_kv_heads=0": BETWEEN,
        'set --config.sample.prompt="" to start documents': BETWEEN,
        "set --config.optimizer.normuon_beta=0": BETWEEN,
        "try --config.passes=1.0, or set --config.total_steps=1000": BETWEEN,
        "schedule.warmup_steps": f"{CONFIG}test_total_steps_covers_the_passes",
        "{}: {}": f"{CONFIG}test_a_damaged_config_json_is_refused_in_one_line",
        "give the folder that launch/train.py wrote": f"{RUNS}test_a_workdir_that_is_no_experiment",
        "must hold an experiment": f"{RUNS}test_a_workdir_that_is_no_experiment",
        "python launch/verify.py --workdir={} --repair": CONFIG_BACK,
        ", or train in a new workdir": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "is damaged, or was changed by hand": CONFIG_BACK,
        "was written by an older tale_jax": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "train again in a new workdir, or use": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "update tale_jax if a newer one": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "must be a number from 1 to": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "it is now {}{}": f"{CONFIG}test_an_old_name_is_told_its_new_one",
        "it was removed; leave it out": f"{CONFIG}test_an_old_name_is_told_its_new_one",
        "did you mean {}{}?": NAMES,
        "did you mean {}?": (NAMES, BETWEEN),
        "see `settings` in tale_jax/config.py": NAMES,
        "be a group of settings; set one of those": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "is not a setting of tale_jax": NAMES,
        "is missing from the config; add it": f"{RUNS}test_a_config_that_is_restored_or_left_behind",
        "try cp1252 or utf-16": BETWEEN,
    },
    "tale_jax/data/corpus.py": {
        "run this once more": f"{DATA}test_text_that_changed_while_it_was_read_is_read_again",
        "add text": SPLITS,
        "set --config.corpus.max_train_bytes={}": SPLITS,
        "holds no text but white space": SPLITS,
        "must hold at least {} bytes": SPLITS,
        "must hold three documents that differ": SPLITS,
        "must hold a document for the {} split": SPLITS,
        "does not exist; give the folder": f"{DATA}test_published_files_that_are_put_where_it_is_told",
        "must not be empty; download it again": f"{DATA}test_published_files_that_are_put_where_it_is_told",
        "must be a folder that holds": f"{DATA}test_published_files_that_are_put_where_it_is_told",
    },
    "tale_jax/data/encode.py": {"run the same command again": f"{DATA}test_encoding_that_was_killed_is_run_again"},
    "tale_jax/data/loader.py": {
        "must not exceed the {} windows": LOADER,
        "as when the data position was saved": f"{RUNS}test_a_data_position_of_other_text",
    },
    "tale_jax/data/prepare.py": {
        "must hold a tokenizer (none in": NO_BASE,
        "must name the path, step, weights and digest": BASE_JSON,
        "restore it from a copy, or remove it": BASE_JSON,
        "was prepared with; restore it": "tests/data/test_chat.py::test_conversations_are_prepared_with_marks",
        "must not exceed the windows of": PREPARED,
        "choose a new --workdir": PREPARED,
        ", or remove {}/windows to prepare again": PREPARED,
        "as in the windows prepared in": PREPARED,
        "set --config.corpus.changed=continue to prepare": PREPARED,
        "must be as it was when": PREPARED,
        "must be that of {}; try --config.tokenizer.vocab_size": (
            f"{CONVERT}test_huggingface.py::test_a_workdir_made_of_a_folder_prepares_other_text"
        ),
        "must be the one that {}/windows": PREPARED,
        "the disk is full": "tests/data/test_prepare.py::test_a_full_disk_is_one_line_and_leaves_nothing_half_written",
        "cannot be written to": PREPARED,
    },
    "tale_jax/data/readers.py": {
        "must hold conversations": "tests/data/test_chat.py::test_a_file_of_text_beside_conversations_is_refused",
        "{} must be a JSON object ({}); {}{}": ROWS,
        "; a .json file must be an array": ROWS,
        "give one object a line": ROWS,
        "the array must end with ]": ROWS,
        "has more after it; remove that": ROWS,
        "must follow a comma": ROWS,
        "must be a JSON object or text": ROWS,
        "must be JSON ({}); correct or remove it": ROWS,
        "close its quotes, and write a quote": ROWS,
        "put quotes around a text": ROWS,
        "download or write it again": PARQUET,
        "must be a parquet file, but is": PARQUET,
        "write the file again without it": PARQUET,
        "download it and set corpus.path": LIBRARY,
        "see corpus.hub_config and corpus.*_split": f"{DATA}test_a_dataset_of_the_hub_with_other_settings",
        "check its name and the network": f"{DATA}test_a_dataset_of_the_hub_with_other_settings",
        "correct or remove it": ROWS,
        "correct or remove it: sed": ROWS,
        "must not hold half a surrogate pair": ROWS,
        "name another field": ROWS,
        "name one of these": ROWS,
    },
    "tale_jax/data/tales/grammar.py": {
        "must be a tale of the grammar": "tests/data/test_questions.py::test_what_is_no_tale_has_no_questions",
        "use one of these": INTERNAL,
        "count tales from 0": INTERNAL,
        "try 2000": INTERNAL,
    },
    "tale_jax/data/text_files.py": {
        "must not hold a NUL character": PATHS,
        "does not exist{}; give a file": PATHS,
        "to learn from{}; add text": PATHS,
        "is a link to nothing": PATHS,
        "is no regular file": PATHS,
        "must hold a file that is not empty": PATHS,
        "if it is text: mv": PATHS,
        "{} must be one of {}; {}": PATHS,
        "; did you mean {}?": PATHS,
        "what the run wrote there is left out": "tests/data/test_prepare.py::test_what_was_not_read_is_said_and_logged",
        "mv {} {}": COMMAND_OF_FILE,
        "whatever its name says": COMMAND_OF_FILE,
        "{} is {}, not {}; {}": COMMAND_OF_FILE,
        "download or compress it again": f"{DATA}test_a_damaged_file_is_compressed_again",
        "or unzstd {}": LIBRARY,
        "{} is {}; {}": COMMAND_OF_FILE,
        "remove it, or move it elsewhere": f"{DATA}test_what_is_no_text_is_removed_as_told",
        "{} {} && ": COMMAND_OF_FILE,
        "decompress it: {} -dc {} >": COMMAND_OF_FILE,
        "name it as what it is: mv": COMMAND_OF_FILE,
        "convert it: {} && mv": COMMAND_OF_FILE,
        "set --config.corpus.encoding={}, or convert it": f"{DATA}test_an_encoding_that_is_named_reads_the_text",
        "iconv -f {}": COMMAND_OF_FILE,
        "set the right --config.corpus.encoding": f"{DATA}test_an_encoding_that_is_named_reads_the_text",
        "but is binary ({}); remove it": f"{DATA}test_what_is_no_text_is_removed_as_told",
        "iconv -c -f UTF-8": COMMAND_OF_FILE,
        "leave such bytes out": COMMAND_OF_FILE,
        "tr -d": COMMAND_OF_FILE,
    },
    "tale_jax/data/token_files.py": {
        "run launch/prepare.py on it first": PREPARED,
        "its digest does not fit": CUT,
        "has a value that cannot be": CUT,
        "it counts what cannot be": CUT,
        "it is not of this split": CUT,
        "must have format_version": PREPARED,
        "remove {} and prepare again": WINDOWS,
        "must have {} bytes, but has {}": WINDOWS,
        "is damaged: its digest is not": WINDOWS,
        "which the tokenizer lacks": f"{WORKDIRS}test_windows_with_tokens_that_are_none_are_prepared_again",
    },
    "tale_jax/data/tokenizer.py": {
        "must be a SentencePiece model": TOKENIZER,
        "give a SentencePiece .model file": TOKENIZER,
        "half a surrogate pair": TOKENIZER,
        "to separate documents; give another": TOKENIZER,
        "must be that of {}; try": TOKENIZER,
        "must give every text back": TOKENIZER,
        "tokens that the text can fill": VOCABULARY,
        "{} must hold {}; try": VOCABULARY,
        "needs text in the training split": f"{DATA}test_text_without_characters_gets_some",
    },
    "tale_jax/evaluation/ngram.py": {"training text must hold at least": INTERNAL},
    "tale_jax/evaluation/quality_samples.py": {
        "--quality must find at least": f"{RUNS}test_an_evaluation_is_refused_before_it_scores_and_goes_as_told"
    },
    "tale_jax/evaluation/scoring.py": {
        "stride={} must be at most": f"{RUNS}test_an_evaluation_is_refused_before_it_scores_and_goes_as_told"
    },
    "tale_jax/hardware/environment.py": {
        "keeps XLA from starting": f"{ENVIRONMENT}test_variables_that_are_unset_as_told_are_no_harm"
    },
    "tale_jax/hardware/backend.py": {
        "backend.platform=metal is not possible here": f"{MACHINE}test_another_platform_starts_as_told",
        "pip uninstall {} to train on the CPU": f"{MACHINE}test_a_plugin_that_is_uninstalled_as_told_is_no_harm",
        "try auto": (
            f"{ENVIRONMENT}test_another_platform_than_jax_starts_is_chosen_as_told",
            f"{MACHINE}test_another_platform_starts_as_told",
        ),
        "keeps JAX from starting": f"{ENVIRONMENT}test_variables_that_are_unset_as_told_are_no_harm",
        "unset {} (it is {})": (
            f"{MACHINE}test_another_platform_starts_as_told",
            "tests/hardware/test_backend.py::test_the_platform_of_the_environment_is_not_changed_behind_ones_back",
        ),
    },
    "tale_jax/hardware/machine.py": {
        "HOME is not set": HOME,
        "are installed and clash; pip uninstall": f"{MACHINE}test_a_plugin_that_is_uninstalled_as_told_is_no_harm",
        "update macOS, or train on the CPU": MAKE,
        "make env EXTRAS=dev,metal": MAKE,
        "make env EXTRAS=dev,jax-metal": MAKE,
    },
    "tale_jax/hardware/sharding.py": {
        "must be the number of devices": f"{MACHINE}test_devices_share_a_batch_as_advised",
        "{}={} {}; try {}": f"{MACHINE}test_devices_share_a_batch_as_advised",
        "must be divisible by the number of {}": f"{MACHINE}test_devices_share_a_batch_as_advised",
        "--config.micro_batch_size={}": f"{MACHINE}test_devices_share_a_batch_as_advised",
    },
    "tale_jax/inference/sampler.py": {
        "{}={} must {}; try --{}={}": f"{RUNS}test_samples_are_asked_for_as_it_is_told",
        "prompts must hold at least one": INTERNAL,
        "num_samples={} must be at least 1": f"{RUNS}test_samples_are_asked_for_as_it_is_told",
        "try --seed=0": f"{RUNS}test_samples_are_asked_for_as_it_is_told",
        "leave it out to start a document": f"{RUNS}test_samples_are_asked_for_as_it_is_told",
        "--long_prompt=window": f"{RUNS}test_samples_are_asked_for_as_it_is_told",
        "params must give finite logits": f"{RUNS}test_weights_that_are_no_numbers_and_an_earlier_step",
        "try --step={}": f"{RUNS}test_weights_that_are_no_numbers_and_an_earlier_step",
    },
    "tale_jax/planning/autotune.py": {
        "must not be given where minutes": f"{RUNS}test_minutes_are_given_as_it_is_told",
        "must be 0 where several processes train": f"{RUNS}test_minutes_are_given_as_it_is_told",
        "for one that learns more use --config.minutes": (
            "tests/planning/test_autotune.py::test_with_time_for_few_steps_the_smallest_size_is_trained_and_that_is_said"
        ),
        "must leave time to train": "tests/planning/test_autotune.py::test_too_little_time_is_one_line_with_a_remedy",
    },
    "tale_jax/planning/devices.py": {
        "plans for devices that are not here": f"{DEVICES}test_flags_that_do_not_go_with_devices_are_left_out_as_told",
        "must be a positive number": f"{DEVICES}test_what_is_no_speed_is_refused_and_another_number_taken",
        "could not be compiled": f"{DEVICES}test_a_step_that_cannot_be_compiled_is_one_line_and_gets_smaller_as_told",
        "--config.model.scan_layers=True": (
            f"{DEVICES}test_a_step_that_cannot_be_compiled_is_one_line_and_gets_smaller_as_told"
        ),
        "or set total_steps": f"{DEVICES}test_a_plan_adds_up_and_is_told",
        "TFLOP/s (--peak_share": f"{DEVICES}test_a_plan_adds_up_and_is_told",
        "GB/s (--bandwidth)": f"{DEVICES}test_a_plan_adds_up_and_is_told",
    },
    "tale_jax/planning/doctor.py": {
        "give another --folder or --workdir": DOCTOR,
        "set XDG_CACHE_HOME to a folder": DOCTOR,
        "set LC_ALL=C.UTF-8": DOCTOR,
        "measured now; to check again": "tests/planning/test_doctor.py::test_tables_show_what_was_found",
        "make env EXTRAS=dev,{}": MAKE,
        "make the environment again": MAKE,
        "try without what is set": f"{MACHINE}test_a_variable_that_keeps_jax_from_starting_is_taken_away",
        "python launch/plan.py --config=configs/tales.py": MAKE,
    },
    "tale_jax/planning/numerics.py": {
        "must be numerically correct on": "tests/planning/test_numerics.py::test_a_dtype_asked_for_must_be_correct",
        "finds no dtype that is numerically correct": (
            "tests/planning/test_numerics.py::test_a_dtype_asked_for_must_be_correct"
        ),
    },
    "tale_jax/planning/plan.py": {
        "this run needs {} of memory": f"{RUNS}test_a_run_is_made_smaller_as_advised_until_it_fits",
        "--config.remat=block": f"{RUNS}test_a_run_is_made_smaller_as_advised_until_it_fits",
        "try {}": f"{RUNS}test_a_run_is_made_smaller_as_advised_until_it_fits",
        "make the model smaller": f"{RUNS}test_a_run_is_made_smaller_as_advised_until_it_fits",
        "or set total_steps": f"{RUNS}test_a_plan_knows_its_length_when_it_is_set",
    },
    "tale_jax/runs/evaluate.py": {
        "leave --quality out": f"{FINETUNE}test_a_base_learns_to_answer",
        "leave it out, and run launch/evaluate.py": f"{SWEEP}test_only_one_process_scores",
        "--score must be left to one process": f"{SWEEP}test_only_one_process_scores",
        "try --sample_temperature": f"{RUNS}test_an_evaluation_is_refused_before_it_scores_and_goes_as_told",
    },
    "tale_jax/planning/scaling_law.py": {
        "remove it": "tests/planning/test_scaling_law.py::test_a_file_without_a_law_is_one_line"
    },
    "tale_jax/runs/engines/": {
        "not be negative": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "set --engine=ray": f"{SWEEP}test_engines_say_what_they_need",
        "or leave --engine out": (
            f"{SWEEP}test_engines_say_what_they_need",
            f"{SWEEP}test_a_cluster_that_takes_no_job_is_one_line",
        ),
        "the cores of this machine": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "try --memory={}MB": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "leave --gpus out": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "try --gpus={}": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "the GPUs that are found here": f"{SWEEP}test_resources_that_this_machine_lacks_are_named",
        "its run is waited for": f"{SWEEP}test_a_run_of_another_process_is_waited_for",
        "be known where runs are stopped early": f"{SWEEP}test_runs_of_unknown_length_are_not_stopped_early",
    },
    "tale_jax/runs/sweep.py": {
        "must name what varies": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "have the form NAME=VALUE,VALUE": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "is not a setting": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "must be given once": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "must not be one value where": f"{SWEEP}test_a_setting_with_a_flag_of_its_own_does_not_vary",
        "stand once in": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "be of type {}": f"{SWEEP}test_what_cannot_be_swept_is_one_line",
        "leave some out": f"{SWEEP}test_too_many_runs",
        "run {}: {}": f"{SWEEP}test_all_runs_are_checked_before_one_starts",
        "leave --config.mesh.processes out": f"{SWEEP}test_all_runs_are_checked_before_one_starts",
        "give another --out": f"{SWEEP}test_a_sweep_grows_and_refuses_other_settings",
        "and the run is scored again": f"{SWEEP}test_a_score_that_was_damaged",
    },
    "tale_jax/runs/ladder.py": {
        "is what a ladder chooses": f"{LADDER}test_sizes_and_lengths_are_not_given",
        "try --share=0.15": f"{LADDER}test_shares_and_minutes_that_cannot_be",
        "try --minutes=480": f"{LADDER}test_shares_and_minutes_that_cannot_be",
        "give another --out": f"{LADDER}test_a_ladder_from_start_to_answer",
        "leave each rung {} steps": f"{LADDER}test_minutes_that_are_too_few_name_enough",
        "minutes; try --minutes={}": f"{LADDER}test_minutes_that_are_too_few_name_enough",
        "fit the smallest model into memory": f"{LADDER}test_a_model_that_fits_into_no_memory",
        "give the same command again to go on": f"{LADDER}test_a_ladder_from_start_to_answer",
        "and the rung is scored again": f"{LADDER}test_a_ladder_from_start_to_answer",
    },
    "tale_jax/runs/experiment.py": {
        "must not be the workdir itself": NO_BASE,
        "give a workdir or a Hugging Face folder": f"{FINETUNE}test_a_base_that_is_gone",
        "must hold a model": OTHER_BASE,
        "must be the model of digest": OTHER_BASE,
        "train first with launch/train.py": f"{RUNS}test_a_workdir_that_is_no_experiment",
        "must be a whole checkpoint of": f"{RUNS}test_weights_are_asked_for_as_it_is_told",
        "restore config.json from a copy": COPY,
        "belongs to another tokenizer": COPY,
        "restore windows from a copy": f"{WORKDIRS}test_windows_of_other_text_are_restored_or_trained_on_anew",
        "try --step={}": PASSED_OVER,
        "restore it from a copy": PASSED_OVER,
        "is damaged: {}; {}": PASSED_OVER,
        "restore one from a copy": PASSED_OVER,
        "must be what the run kept": f"{RUNS}test_weights_are_asked_for_as_it_is_told",
        "try --weights=mean:2": f"{RUNS}test_weights_are_asked_for_as_it_is_told",
    },
    "tale_jax/runs/resume.py": {
        "whose length was given in steps": (
            "tests/runs/test_resume.py::test_minutes_of_a_run_of_steps_are_refused_with_the_steps_that_they_are"
        ),
        "must leave steps to take": "tests/runs/test_resume.py::test_less_minutes_end_a_run_earlier",
    },
    "tale_jax/runs/records.py": {
        "give the folder of an experiment": f"{RUNS}test_a_report_is_written_when_there_is_what_it_asks_for",
        "train first, then report": f"{RUNS}test_a_report_is_written_when_there_is_what_it_asks_for",
        "restore it from a copy, or remove it": f"{RUNS}test_a_report_is_written_when_there_is_what_it_asks_for",
    },
    "tale_jax/runs/report.py": {
        "no workdir is given": f"{RUNS}test_a_report_is_written_when_there_is_what_it_asks_for"
    },
    "tale_jax/runs/train.py": {
        "--workdir={} --config.total_steps={}": GOES_ON,
        "to train longer": GOES_ON,
        "base= must name the model": NO_BASE,
        "be adamw with lora.rank above 0": NO_BASE,
        "be 0 with a base": NO_BASE,
        "set --config.optimizer.name=adamw": NO_BASE,
        "set --config.minutes=0": NO_BASE,
        "the same command goes on from there": (
            "tests/runs/test_train.py::test_interrupted_and_resumed_equals_straight_through"
        ),
        "must be {} to go on with the experiment": f"{RUNS}test_a_run_goes_on_with_the_setting_that_is_named",
        "sample.prompt": f"{RUNS}test_a_prompt_that_no_sample_could_follow_is_shortened",
        "shorten it, or leave it out": f"{RUNS}test_a_prompt_that_no_sample_could_follow_is_shortened",
        "training diverged": f"{RUNS}test_a_run_that_diverged_learns_at_the_rate_that_is_advised",
        "memory ran out, though": f"{RUNS}test_memory_that_ran_out_and_the_same_command_with_less",
    },
    "tale_jax/training/checkpoint.py": {
        "must hold a checkpoint; train first": INTERNAL,
        "the checkpoint could not be written": (
            "tests/training/test_checkpoint.py::test_a_disk_that_refuses_is_one_line_and_leaves_the_checkpoints_before"
        ),
        "is not finite at step": "tests/training/test_checkpoint.py::test_nothing_that_is_not_finite_is_saved",
        "what was saved is not what is read again": (
            "tests/training/test_checkpoint.py::test_a_disk_that_reads_other_numbers_is_found_at_the_first_save"
        ),
        "remove that folder": FITS_NOT,
        "is not a checkpoint that can be read": FITS_NOT,
        "restore the one that belongs to it": FITS_NOT,
        "it is a link, and must be the folder itself": NONE,
        "its manifest is of step": NONE,
        "its manifest has values that cannot be": NONE,
    },
    "tale_jax/training/metrics.py": {
        "needs credentials": f"{RUNS}test_records_go_where_it_is_told",
        "does not start ({}); try --config.metrics.wandb": f"{RUNS}test_records_go_where_it_is_told",
    },
    "tale_jax/runs/verify.py": {
        "train.py and --repair give it": MENDED,
        "restore the tokenizer from a copy, or prepare again": MENDED,
        "line {} is {}": MENDED,
        "verify --repair": MENDED,
    },
    "tale_jax/bench/serving.py": {
        "must answer with texts": f"{SERVE}test_a_load_is_asked_for_as_it_is_told",
        "must be the address of a server": f"{SERVE}test_a_load_is_asked_for_as_it_is_told",
    },
    "tale_jax/convert/dtypes.py": {
        "try bfloat16": f"{CONVERT}test_huggingface.py::test_a_weight_that_float16_cannot_hold"
    },
    "tale_jax/convert/formats.py": {
        "must be a workdir or a Hugging Face folder": NO_BASE,
        "give one of --to=FORMAT": f"{CONVERT}test_formats.py::test_a_mistake_is_corrected_as_told",
        "--{} is missing; give": f"{CONVERT}test_formats.py::test_a_mistake_is_corrected_as_told",
        "has no use with": f"{CONVERT}test_formats.py::test_a_mistake_is_corrected_as_told",
        "--{}={} {}": f"{CONVERT}test_huggingface.py::test_a_workdir_made_of_a_folder_is_one_like_any_other",
    },
    "tale_jax/convert/gguf.py": {
        "model.rope_scaling must be 0": NO_GGUF,
        "must be those of {} for gguf": NO_GGUF,
        "must be byte-pair encoding for gguf": NO_GGUF,
    },
    "tale_jax/convert/huggingface.py": {
        "--dtype={} must be one of": f"{CONVERT}test_huggingface.py::test_a_weight_that_float16_cannot_hold",
        "bring a model of one of these": THEIRS,
        "{}: {}={} {}; bring another model": THEIRS,
        "layer_types must all be": THEIRS,
        "{}: {}": THEIRS,
        "rope_theta={} must be": THEIRS,
        "rope scaling": THEIRS,
        "must be a number; copy the file again": THEIRS,
        "must be an object; copy the file again": THEIRS,
        "must be a Hugging Face folder": FOLDER,
        "must hold a tokenizer": FOLDER,
        "must have a token for": (
            f"{CONVERT}test_huggingface.py::test_marks_are_found_where_the_tokenizer_does_not_name_them"
        ),
        "as its config.json has it": THEIRS,
        "by its config.json": THEIRS,
        "bring a plain Llama": THEIRS,
        "it belongs to another model": (
            f"{CONVERT}test_huggingface.py::test_a_tokenizer_whose_size_is_not_that_of_the_embedding"
        ),
    },
    "tale_jax/convert/safetensors_files.py": {
        "convert it": f"{CONVERT}test_safetensors_files.py::test_numbers_that_are_no_weights",
        "and its shards; download": INDEX,
        "of names to shards": INDEX,
        "which is no file beside it": INDEX,
        "lacks the shard": INDEX,
        "which {} places in": INDEX,
        "is not a sound safetensors file": SOUND,
        "a header of": LONG_HEADER,
        "its header is": SOUND,
        "{} {} {}": SOUND,
        "its tensors end": SOUND,
        "{} lacks dtype, shape": SOUND,
        "which is not known": SOUND,
        "that are no numbers": SOUND,
        "not those of shape": SOUND,
    },
    "tale_jax/convert/tokenizer_json.py": {"train one with launch/prepare.py": NO_TOKENIZER_JSON},
    "tale_jax/convert/weights.py": {
        "merge them into the model": f"{CONVERT}test_huggingface.py::test_weights_that_have_no_name_elsewhere"
    },
    "tale_jax/data/json_tokenizer.py": {
        "use another base": JSON_TOKENIZER,
        "must be JSON in UTF-8": JSON_TOKENIZER,
        "that can be read ({}); copy": JSON_TOKENIZER,
    },
    "tale_jax/serve/chat.py": {
        "messages: {}": f"{SERVE}test_messages_and_a_template_that_suit_each_other",
    },
    "tale_jax/data/packing.py": {
        "up to its first answer": "tests/data/test_packing.py::test_windows_too_short_for_any_answer_are_refused"
    },
    "tale_jax/data/chat.py": {
        "correct or remove it": CONVERSATION,
        "put the messages in order": CONVERSATION,
        "fill it in, or remove the row": CONVERSATION,
        "remove what stands after": CONVERSATION,
        "the conversation that begins with": "tests/data/test_chat.py::test_a_template_that_refuses_a_row_names_it",
    },
    "tale_jax/data/chat_template.py": {
        "must begin an answer as add_generation_prompt does": REFUSED,
        "refuses this conversation": REFUSED,
        "the chat template cannot be used": HARM,
    },
    "tale_jax/data/template_worker.py": {"it writes more than": LIMITS, "it takes more than": LIMITS},
    "tale_jax/evaluation/lm_eval.py": {
        "give another": TASKS,
        "see https": TASKS,
        "did you mean": TASKS,
        "a folder of tasks; {}": TASKS,
        "must name tasks": TASKS,
        "cannot be run": TASKS,
    },
    "tale_jax/inference/conversation.py": {
        "the message must fit the context": f"{TALK}test_the_oldest_turns_leave_when_the_context_is_full",
        "--chat needs a chat template": f"{TALK}test_a_conversation_needs_a_template_and_one_sample",
        "must be 1 with --chat": f"{TALK}test_a_conversation_needs_a_template_and_one_sample",
    },
    "tale_jax/model/adapters.py": {"try --config.lora.rank": NO_BASE},
    "tale_jax/convert/peft.py": {
        "--to=peft needs adapters": f"{CONVERT}test_peft.py::test_what_cannot_be_an_adapter",
        "for peft; q8_0 is for gguf": f"{CONVERT}test_peft.py::test_what_cannot_be_an_adapter",
    },
    "tale_jax/serve/inspect.py": {
        "{}={} must be below": BODY,
        "ask for one head": SHORTER,
        "was not trained on the embedded tales": LACKING,
        "and must have at most": SHORTER,
    },
    "tale_jax/serve/models.py": {"ask /inspect/checkpoints": f"{SERVE}test_a_checkpoint_that_is_damaged_and_another"},
    "tale_jax/serve/schema.py": {"": BODY},
    "tale_jax/serve/server.py": {
        "has no chat template": LACKING,
        "must be left out": BODY,
        "prompts must be at most": BODY,
        "the queue is full": f"{SERVE}test_a_full_queue_takes_it_again",
        "send Content-Type": SENT,
        "the body must have at most": SENT,
        "the body must come within": SENT,
        "the body must be JSON in UTF-8": BODY,
        "model is missing": NAMED,
        "there is no such model": NAMED,
        "only `model` can be asked for": NAMED,
        "more than {}": SHORTER,
        "must hold ids below": BODY,
        "step": (BODY, f"{SERVE}test_a_checkpoint_that_is_damaged_and_another"),
        "ablate.": BODY,
        "the server ends": f"{SERVE}test_a_server_that_ends_and_another",
        "must fit the context": SHORTER,
        "{} is not JSON": BODY,
        "--api_key_file={} must hold": f"{SERVE}test_a_file_of_keys_that_is_corrected_as_told_is_read",
        "must be free to listen on": f"{SERVE}test_a_port_that_is_taken_and_one_that_is_free",
        "must be a name or an address of this machine": f"{SERVE}test_a_host_that_is_not_this_machine_and_one_that_is",
    },
    "tale_jax/serve/settings.py": {
        "must {}; try --{}={}": f"{SERVE}test_a_setting_that_is_corrected_as_told_serves",
        "must be as a browser sends it": f"{SERVE}test_a_setting_that_is_corrected_as_told_serves",
    },
    "tale_jax/utils/files.py": {
        "must be JSON ({}); {}": JSON_TOKENIZER,
        "must be a JSON object; {}": JSON_TOKENIZER,
        "put the file itself there": LINKS,
        "and has {}; restore it": LINKS,
        "is a pipe or device; remove it": LINKS,
        "remove it, or restore it from a copy": LINKS,
    },
    "tale_jax/utils/extras.py": {"-m pip install -e": LIBRARY},
    "tale_jax/utils/paths.py": {
        "must name a file or folder": HOME,
        "must not hold a NUL": HOME,
        "HOME is not set": HOME,
        "there is no user": HOME,
        "~ has no meaning here": HOME,
        "must have a name in UTF-8": USABLE,
        "give the folder": USABLE,
        "give the path of a file": USABLE,
        "check its path": USABLE,
        "it is a link to nothing": USABLE,
        "must not exist yet": f"{CONVERT}test_formats.py::test_a_mistake_is_corrected_as_told",
        "is no folder; give another path": USABLE,
        "(permission denied); give another, or chmod it": PERMITTED,
        "may not be written to; give another path": PERMITTED,
    },
    "tale_jax/utils/streams.py": {
        "standard output": f"{ENVIRONMENT}test_results_that_could_not_be_written_are_written_elsewhere"
    },
    "tale_jax/utils/format.py": {"try --memory=8GB": INTERNAL},
    "tale_jax/utils/locks.py": {
        "stop it": f"{RUNS}test_a_writer_is_stopped_as_told",
        "give another --workdir": (f"{RUNS}test_a_writer_is_stopped_as_told"),
    },
    "tale_jax/utils/manifests.py": {
        "it is no regular file": LINKS,
        "{} is missing": "tests/utils/test_manifests.py::test_every_change_is_found_and_named",
        "{} is too large": "tests/utils/test_manifests.py::test_every_change_is_found_and_named",
        "{} is damaged": "tests/utils/test_manifests.py::test_every_change_is_found_and_named",
        "{} cannot be read": INTERNAL,
    },
    "tale_jax/utils/settings.py": {
        "try {}": (
            f"{CONFIG}test_a_broken_rule_is_one_line_whose_remedy_works",
            f"{CONFIG}test_a_misspelled_choice_gets_the_nearest",
        ),
        "be of type {}": f"{CONFIG}test_a_value_of_another_type_is_refused_and_the_remedy_works",
        "be one of {}": f"{CONFIG}test_a_misspelled_choice_gets_the_nearest",
        "did you mean {}?": f"{CONFIG}test_a_misspelled_choice_gets_the_nearest",
    },
}


def named_tests(message: Message) -> tuple[str, ...]:
    """The tests that provoke a message, by id without parameters; the rows of a folder are of all its files."""
    found: dict[str, None] = {}
    for place, rows in REMEDIES.items():
        for part, tests in rows.items() if message.file.startswith(place) else ():
            if part in message.template:
                found |= dict.fromkeys([tests] if isinstance(tests, str) else tests)
    return tuple(found)
