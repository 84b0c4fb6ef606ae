"""`make mutants`: break one line of the code at a time; the named test must turn red. Exits 1 if a break survives."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SCHEDULER, LOSSES, GUIDANCE, SOURCES, DATA, STREAM, CAPTIONS = (
    f"pipeline/{name}.py" for name in ("scheduler", "losses", "guidance", "sources", "data", "stream", "captions"))
PIPELINE, SERVING, TRAIN = "pipeline/text_to_image.py", "pipeline/serving.py", "train_text2img.py"
MUON, LATENTS, MODELS = (f"pipeline/{name}.py" for name in ("muon", "latents", "models"))
EMOJI, VARIATIONS = "pipeline/emoji.py", "pipeline/variations.py"
MEASURES, EVALUATION, SWEEP = (f"pipeline/{name}.py" for name in ("measures", "evaluation", "sweep"))
SEARCH, VERIFIERS = "pipeline/search.py", "pipeline/verifiers.py"
SAFE, LAYOUT, HUB, CARD, CONFIG = (f"pipeline/{name}.py" for name in ("safe", "layout", "hub", "card", "config"))
BENCH, SAMPLING, JUDGED, LADDER = (f"benchmarks/{name}.py" for name in ("bench", "sampling", "guidance", "ladder"))

# (file, what a line says, what it says broken, the test that notices)
MUTANTS = [
    (SCHEDULER, "(1 - beta).cumprod(0)])  #", "(1 - beta).cumsum(0)])  #", "test_scheduler.py::test_abar_is_the_product_of_the_alphas"),
    (SCHEDULER, "x_t += root(1 - abar_t) * wide(noise)", "x_t += (1 - abar_t) * wide(noise)",
     "test_scheduler.py::test_chain_of_single_steps_has_the_moments_of_the_direct_jump"),
    (SCHEDULER, "x_t += root(1 - alpha) * wide(noise)", "x_t += (1 - alpha) * wide(noise)",
     "test_scheduler.py::test_variance_is_preserved_per_dimension"),
    (SCHEDULER, "x_t_part = root(alpha) * (1 - abar_s)", "x_t_part = alpha * (1 - abar_s)",
     "test_scheduler.py::test_posterior_is_bayes_rule_for_two_gaussians"),
    (SCHEDULER, "x_0_part = root(abar_s) * (1 - alpha)", "x_0_part = root(abar_t) * (1 - alpha)",
     "test_scheduler.py::test_posterior_is_bayes_rule_for_two_gaussians"),
    (SCHEDULER, "(1 - abar_s) / (1 - abar_t) * (1 - alpha)\n", "(1 - alpha) + 0 * abar_s\n",
     "test_scheduler.py::test_posterior_is_what_simulation_shows"),
    (SCHEDULER, "mean += root(variance) * z", "mean += variance * z",
     "test_scheduler.py::test_every_step_is_that_of_diffusers"),
    (SCHEDULER, "x_0 = self.clip(self.predict_x_0(model_output, t, sample))", "x_0 = self.predict_x_0(model_output, t, sample)",
     "test_scheduler.py::test_every_step_is_that_of_diffusers"),
    (SCHEDULER, "variance = eta**2 * variance", "variance = eta * variance", "test_scheduler.py::test_every_ddim_step_is_that_of_diffusers"),
    (SCHEDULER, "root(1 - abar_s - variance) * self.predict_eps", "root(1 - abar_s) * self.predict_eps",
     "test_scheduler.py::test_every_ddim_step_is_that_of_diffusers"),
    (SCHEDULER, "variance = (1 - abar_t / abar_s) * (abar_s != 1)", "variance = 1 - abar_t / abar_s",
     "test_scheduler_conformance.py::test_the_transition_to_the_clean_image_is_certain"),
    (SCHEDULER, "return (x_t - root(1 - abar_t) * out) / root(abar_t)", "return (x_t - (1 - abar_t) * out) / root(abar_t)",
     "test_scheduler.py::test_every_prediction_gives_back_the_image_and_the_noise"),
    (SCHEDULER, "v -= root(1 - abar_t) * wide(sample)", "v += root(1 - abar_t) * wide(sample)",
     "test_scheduler.py::test_every_prediction_gives_back_the_image_and_the_noise"),
    (SCHEDULER, "numbers[t + 1]", "numbers[t]", "test_scheduler_conformance.py::test_one_timestep_per_example_equals_one_example_at_a_time"),
    (SCHEDULER, "return x_0.clamp(-size, size) / size", "return x_0.clamp(-size, size)",
     "test_scheduler_conformance.py::test_dynamic_thresholding_rescales_and_a_maximum_of_one_warns"),
    (LOSSES, ".square().flatten(1).mean(1)\n", ".abs().flatten(1).mean(1)\n",
     "test_losses.py::test_default_objective_is_the_plain_error_in_the_noise"),
    (LOSSES, "return WEIGHTS[name](snr, gamma) / (snr + 1)", "return WEIGHTS[name](snr, gamma) / snr",
     "test_losses.py::test_one_error_weighs_the_same_whatever_the_network_predicts"),
    (LOSSES, "return (1 - alpha) ** 2 / (2 * variance * alpha * (1 - abar_t))", "return (1 - alpha) ** 2 / (2 * variance * (1 - abar_t))",
     "test_losses.py::test_posterior_kl_is_the_weighted_noise_error"),
    (LOSSES, "abar_t * x_0.square() - abar_t - (1 - abar_t).log()", "abar_t * x_0.square() - (1 - abar_t).log()",
     "test_losses.py::test_prior_is_torch_s_own_gaussian_divergence"),
    (LOSSES, "variance_hat + ratio - 1 - ratio.log()", "variance_hat", "test_losses.py::test_step_is_torch_s_own_gaussian_divergence"),
    (GUIDANCE, "return eps_c + w * (eps_c - eps_u)", "return eps_u + w * (eps_c - eps_u)",
     "test_guidance.py::test_guidance_is_the_lectures_combination"),
    (GUIDANCE, "w if lo <= level <= hi else none", "w if lo <= level else none", "test_guidance.py::test_interval_guides_inside_only"),
    (DATA, 'return uniform(seed, step, slots, "dropout") >= p', 'return uniform(seed, step, slots, "dropout") > 1 - p',
     "test_data.py::test_dropout_is_exactly_p"),
    (DATA, 'f"{what} {seed} {step} {slot}"', 'f"{what} {seed} {slot}"', "test_data.py::test_seed_step_slot_and_purpose_each_give_another_stream"),
    (DATA, 'return torch.randperm(n, generator=randomness(seed, epoch, 0, "order"))', "return torch.arange(n)",
     "test_data.py::test_epochs_and_seeds_differ_in_order"),
    (DATA, 'share = (stratum + uniform(seed, step, slots, "t")) / global_batch', 'share = uniform(seed, step, slots, "t")',
     "test_data.py::test_timesteps_have_one_in_each_stratum"),
    (SCHEDULER, "zip(plan, [*plan[1:], -1], strict=True))", "zip(plan, [t - 1 for t in plan], strict=True))",
     "test_scheduler.py::test_every_ddim_step_is_that_of_diffusers"),
    (SCHEDULER, "np.arange(n) * (T / n)", "np.arange(n) * (T // n)",
     "test_scheduler.py::test_every_step_is_that_of_diffusers[7-trailing-fixed_small-epsilon-True]"),
    (SCHEDULER, "(root - root[-1]) * root[0]", "(root - root[-1])",
     "test_scheduler.py::test_schedules_are_those_of_diffusers[linear-1000-True]"),
    (SCHEDULER, "return torch.promote_types(x.dtype, torch.float32)", "return x.dtype",
     "test_scheduler.py::test_half_precision_samples_are_computed_in_float32"),
    (SCHEDULER, "if eta > 0 and (s", "if (s", "test_scheduler.py::test_nothing_is_drawn_where_nothing_is_random"),
    (SCHEDULER, "model_output.shape, generator, model", "model_output.shape, None, model",
     "test_scheduler.py::test_one_generator_per_image_makes_images_independent_of_their_batch"),
    (LOSSES, "(snr + 1).clamp(max=gamma)", "snr.clamp(max=gamma)",
     "test_losses.py::test_one_error_weighs_the_same_whatever_the_network_predicts"),
    (LOSSES, "        return x_0\n", "        return eps\n",
     "test_losses.py::test_target_is_what_the_scheduler_turns_back_into_the_image"),
    (LOSSES, "half = 1 / (levels - 1)", "half = 1 / levels", "test_losses.py::test_decoder_is_a_distribution_over_the_levels"),
    (PIPELINE, "return of_scale(guidance_scale)", "return guidance_scale",
     "test_text_to_image.py::test_p13_guidance_scale_keeps_diffusers_meaning"),
    (PIPELINE, "(w != 0).nonzero()", "(w == w).nonzero()",
     "test_text_to_image.py::test_without_guidance_there_is_one_conditional_call_a_step"),
    (PIPELINE, "manual_seed(seed + i)", "manual_seed(seed)", "test_text_to_image.py::test_seeds_are_generators_one_an_image"),
    (DATA, 'uniform(seed, step, slots, "dropout")', 'uniform(seed, 0, slots, "dropout")', "test_data.py::test_dropout_is_exactly_p"),
    (DATA, 'f"{what} {seed} {step} {slot}"', 'f"{what} {step} {slot}"',
     "test_data.py::test_seed_step_slot_and_purpose_each_give_another_stream"),
    (DATA, "torch.randn(*shape, generator=randomness(seed, step, int(slot), what))", "torch.randn(*shape)",
     "test_data.py::test_randomness_does_not_depend_on_how_a_batch_is_split"),
    (DATA, 'torch.randperm(global_batch, generator=randomness(seed, step, 0, "strata"))', "torch.arange(global_batch)",
     "test_data.py::test_each_slots_timestep_is_uniform"),
    (TRAIN, "keep[:, None, None], states, parts.empty)", "keep[:, None, None], states, states)",
     "test_train.py::test_the_loss_depends_on_captions_exactly_where_they_are_kept"),
    (CAPTIONS, "out.mean.copy_(tokens.mean(0))", "out.mean.zero_()",
     "test_captions.py::test_states_come_out_centred_with_covariance_one_but_for_the_ridge"),
    (CAPTIONS, "tokens = states[states.any(-1)]", "tokens = states.flatten(0, -2)",
     "test_captions.py::test_padding_stays_zero_and_takes_no_part"),
    (CAPTIONS, "return torch.where(real, white, 0)", "return white", "test_captions.py::test_padding_stays_zero_and_takes_no_part"),
    (SAFE, "importlib.import_module(f\"{__package__}.{OURS[name]}\").__name__", "f\"{__package__}.{OURS[name]}\"",
     "test_text_to_image.py::test_p1_a_fresh_process_loads_it"),
    (TRAIN, "white(encode(held_out.all_captions))", "encode(held_out.all_captions)",
     "test_train.py::test_the_saved_pipeline_draws_and_a_checkpoint_holds_a_loadable_unet"),
    (TRAIN, 'white(encode([""]))', 'encode([""])',
     "test_train.py::test_the_saved_pipeline_draws_and_a_checkpoint_holds_a_loadable_unet"),
    (TRAIN, "    set_threads(config, accelerator)\n    keep_freed_memory()\n", "    set_threads(config, accelerator)\n",
     "test_train.py::test_the_script_keeps_freed_memory_so_that_a_step_costs_no_page_faults"),
    (TRAIN, "eps = data.noise(seed, step, slots,", "eps = data.noise(seed, step, range(len(slots)),",
     "test_train.py::test_accumulated_micro_steps_are_one_batch"),
    (SERVING, "not isinstance(value, bool) and low <= value <= high", "not isinstance(value, bool) and low <= value",
     "test_serving.py::test_a_request_out_of_range_is_refused_by_name"),
    (SERVING, "        hook.remove()\n", "        pass\n", "test_serving.py::test_leaving_early_leaves_nothing_behind"),
    (SERVING, "torch.Generator().manual_seed(request.seed) for _ in", "torch.Generator().manual_seed(_) for _ in",
     "test_serving.py::test_the_sweep_is_one_noise_under_six_weights"),
    (TRAIN, "        run.card.unlink(missing_ok=True)", "        bool(run.card)",
     "test_train.py::test_a_finished_run_that_goes_on_is_unfinished_until_its_new_end"),
    (MUON, "out=torch.empty_like(weight))", "out=torch.empty_like(weight.grad))",
     "test_muon.py::test_steps_are_those_of_torchs_muon_on_the_flattened_weights"),
    (MUON, "0.2 * max(shape) ** 0.5", "0.2 * min(shape) ** 0.5",
     "test_muon.py::test_steps_are_those_of_torchs_muon_on_the_flattened_weights"),
    (MUON, "for _ in range(ITERATIONS):", "for _ in range(1):", "test_muon.py::test_singular_values_come_near_one_and_directions_stay"),
    (LATENTS, "(mean + std * z.to(mean) - self.shift)", "(mean - self.shift)", "test_finetune.py::test_latents_are_what_the_autoencoder_says"),
    (LATENTS, "for x in (pixels, pixels.flip(3))]", "for x in (pixels, pixels)]",
     "test_finetune.py::test_latents_are_what_the_autoencoder_says"),
    (MODELS, '{"clip_sample": False} | {', "{",
     "test_finetune.py::test_the_scheduler_that_trained_is_the_one_that_is_saved"),
    (MODELS, "lora_alpha=lora.alpha or lora.rank", "lora_alpha=lora.rank", "test_finetune.py::test_only_the_adapter_is_trained_and_saved"),
    (MODELS, 'unet_lora_adapter_metadata=network.peft_config["default"].to_dict())', "unet_lora_adapter_metadata=None)",
     "test_finetune.py::test_a_checkpoint_of_a_lora_run_draws_as_the_finished_one"),
    (SOURCES, "return [caption for caption in captions if caption]", "return captions",
     "test_sources.py::test_a_list_or_several_columns_are_a_rows_captions_and_empty_ones_are_none"),
    (SOURCES, "isinstance(builder, Cache) and", "False and",
     "test_sources.py::test_a_warm_cache_is_enough_without_a_network_and_a_cold_one_is_one_sentence"),
    (SOURCES, "            wait(seconds)\n", "", "test_sources.py::test_a_network_that_fails_is_asked_again_after_ever_longer_waits"),
    (SOURCES, "digest(str(builder.cache_dir), split,", "digest(config.source, split,",
     "test_sources.py::test_a_table_that_changed_is_read_anew"),
    (DATA, "return self.first[rows] + caption_choice(", "return rows + caption_choice(",
     "test_data.py::test_the_caption_of_an_example_is_one_of_its_rows"),
    (DATA, '(uniform(seed, step, slots, "caption") * counts)', '(uniform(seed, 0, slots, "caption") * counts)',
     "test_data.py::test_each_of_a_rows_captions_is_drawn_as_often_as_the_others_and_anew_every_step"),
    (DATA, 'some + [""] * (ENCODED - len(some))', "some",
     "test_data.py::test_states_asked_for_one_by_one_are_those_of_all_at_once"),
    (DATA, "self.kept.move_to_end(caption)", "pass", "test_data.py::test_states_asked_for_one_by_one_are_those_of_all_at_once"),
    (STREAM, "mixed[place.position :].split", "mixed.split", "test_stream.py::test_a_stream_goes_on_where_its_state_was_taken"),
    (STREAM, "position=0, source=self.dataset.state_dict())", "position=0, source=None)",
     "test_stream.py::test_a_stream_goes_on_where_its_state_was_taken"),
    (STREAM, "self.place = places[-1]", "pass", "test_stream.py::test_a_stream_goes_on_where_its_state_was_taken"),
    (STREAM, "iterator, self.iterator = self.iterator, None", "iterator = self.iterator",
     "test_stream.py::test_a_network_that_fails_now_and_then_changes_nothing"),
    (STREAM, "split_dataset_by_node(shards, process, processes)", "shards", "test_stream.py::test_processes_share_an_epoch"),
    (TRAIN, "parts.encoded(batch, slice(None), flip)", "parts.encoded(batch, slice(None))",
     "test_stream.py::test_what_a_step_draws_changes_what_is_learnt"),
    (TRAIN, "            stream.load_state_dict(saved", "            dict(saved", "test_stream.py::test_a_run_on_a_stream_resumes_in_the_same_bytes"),
    (SAFE, 'if OURS.get(name) == library.rpartition(".")[2]:', "if name in OURS:", "test_hub.py::test_an_index_may_name_known_classes_only"),
    (SAFE, "isinstance(found, type) and issubclass(found, tuple(getattr(module, base) for base in BASES[library]))", "found is not None",
     "test_hub.py::test_an_index_may_name_known_classes_only"),
    (LAYOUT, "if key not in OF_THIS_MACHINE}\n        for", "}\n        for", "test_hub.py::test_no_file_of_a_saved_pipeline_tells_where_it_was"),
    (LAYOUT, "kept = not settings.get(\"clip_sample\") and offset == 1", "kept = True",
     "test_hub.py::test_a_stable_diffusion_loads_in_stock_diffusers_and_ours_lies_beside_it"),
    (HUB, "answer in (408, 412, 429)", "answer in (408, 429)",
     "test_hub.py::test_a_busy_hub_and_a_lost_answer_still_make_one_commit_and_an_unchanged_model_none"),
    (HUB, "        api.preupload_lfs_files(repo, [CommitOperationAdd(\"README.md\", str(dry).encode())])  # asks, and sends nothing\n", "",
     "test_hub.py::test_what_a_push_needs_is_tried_before_training"),
    (CARD, "max([3, *(len(run) + 1 for", "max([3, *(0 * len(run) for", "test_hub.py::test_hostile_words_stay_words_in_a_card"),
    (CONFIG, "hub=dataclasses.replace(self.hub, token=None)", "hub=self.hub", "test_hub.py::test_no_token_is_told_to_anybody"),
    (VARIATIONS, "shade = paint * np.minimum(light / middle, 1)", "shade = paint",
     "test_variations.py::test_the_main_color_becomes_the_paint_and_its_shades_follow"),
    (VARIATIONS, "return any(set(prompt.split())", "return any({1} & set(prompt.split())",
     "test_variations.py::test_nothing_shows_or_tells_what_is_asked_at_the_end"),
    (VARIATIONS, "if where.sum() > MOSTLY * solid.sum() else ()", "if where.any() else ()",
     "test_variations.py::test_what_is_red_or_of_no_color_is_not_painted_red"),
    (EMOJI, "entry.category not in THINGS or entry.grid or any(", "entry.category not in THINGS or any([] and ",
     "test_variations.py::test_nothing_shows_or_tells_what_is_asked_at_the_end"),
    (EMOJI, "and name != plain and name not in captions", "and name != plain",
     "test_variations.py::test_an_emoji_has_its_other_names_in_words"),
    (EVALUATION, 'if not metadata.get("variation")]', "]", "test_variations.py::test_the_varied_set_trains_on_more_and_is_judged_on_the_same"),
    (DATA, 'if crop == "center" else anywhere(content)', 'if crop == "center" else 0.5',
     "test_data.py::test_a_random_crop_is_anywhere_and_the_same_at_every_start_and_in_a_stream"),
    (DATA, "read(held_out, config.held_out)", "read(config, config.held_out)",
     "test_data.py::test_a_random_crop_is_anywhere_and_the_same_at_every_start_and_in_a_stream"),
    (STREAM, "crop=self.config.crop)", 'crop="center")',
     "test_data.py::test_a_random_crop_is_anywhere_and_the_same_at_every_start_and_in_a_stream"),
    (EMOJI, "len(entry.caption.split()) < 3", "len(entry.caption.split()) < 9",
     "test_variations.py::test_only_what_has_a_short_name_comes_twice_or_three_times"),
    (TRAIN, " or not state[\"step\"]:", ":", "test_stream.py::test_a_stream_that_fails_before_the_first_step_leaves_no_checkpoint"),
    (TRAIN, "            stream.place = place\n", "", "test_stream.py::test_a_stream_that_fails_for_good_saves_the_steps_before"),
    (BENCH, "- np.asarray(theirs, float)", "- np.sort(np.asarray(theirs, float))", "test_benchmarks.py::test_paired_interval_is_that_of_a_mean"),
    (BENCH, "met = value >= goal if at_least else value <= goal", "met = value >= goal",
     "test_benchmarks.py::test_spreads_and_goals_say_what_they_saw"),
    (SAMPLING, "guidance_scale=1 + self.w", "guidance_scale=self.w",
     "test_benchmarks.py::test_ours_and_stock_draw_the_same_pixels_and_the_bound_is_the_networks_calls"),
    (SAMPLING, "times = 2 if doubled else 1", "times = 1",
     "test_benchmarks.py::test_ours_and_stock_draw_the_same_pixels_and_the_bound_is_the_networks_calls"),
    (SAMPLING, "if not bf16 and apart > LEVEL:", "if not bf16 and apart > 1:", "test_benchmarks.py::test_sampling_refuses_other_pixels"),
    (JUDGED, "* out_c.std(dims", "* out_u.std(dims", "test_benchmarks.py::test_rescale_is_diffusers"),
    (JUDGED, "- (difference - parallel) -", "- difference -", "test_benchmarks.py::test_apg_is_diffusers"),
    (TRAIN, "t = torch.full((len(rows),), k, device=x_0.device)", "t = torch.full((len(rows),), k)",
     "test_train.py::test_nothing_is_left_on_another_device"),
    (TRAIN, "None if held is None else held.to(device)", "held", "test_train.py::test_nothing_is_left_on_another_device"),
    (TRAIN, '.get("data", read)) != read', '.get("data", read)) is None', "test_train.py::test_changed_pictures_are_refused_and_named"),
    (TRAIN, "settings.flatten(config.to_dict())", "settings.flatten(vars(config))",
     "test_train.py::test_tensorboard_gets_the_curves_and_the_settings_without_the_token"),
    (MUON, "self._step_supports_amp_scaling = False", "self._step_supports_amp_scaling = True",
     "test_muon.py::test_a_scalers_overflow_moves_nothing_and_what_follows_is_as_if_it_had_not_been"),
    (PIPELINE, ".split(ENCODED)]", ".split(len(images))]", "test_text_to_image.py::test_a_vae_encodes_a_few_images_at_a_time_and_keeps_no_graph"),
    (MODELS, '"trust_remote_code": False', '"trust_remote_code": None',
     "test_models.py::test_a_text_encoder_of_its_own_code_is_refused_without_asking"),
    (SOURCES, "wide if None in entry else {", "{", "test_data.py::test_a_csv_listing_is_read_as_image_folders_have_it"),
    (SOURCES, "and not belongs(picture[", "and belongs(picture[", "test_sources.py::test_a_table_of_the_hub_names_no_other_files"),
    (SOURCES, '{"test", "validation", held_out}', '{"test", "validation"}',
     "test_data.py::test_a_held_out_folder_in_a_flat_one_is_not_trained_on"),
    (GUIDANCE, "else max(w, 0) if", "else w if", "test_text_to_image.py::test_p13_guidance_scale_keeps_diffusers_meaning"),
    (SERVING, "if not isinstance(pipe.scheduler, DDPMScheduler):", "if False:",
     "test_serving.py::test_a_model_with_a_stock_scheduler_shows_the_equations_of_its_own_noise"),
    (SAFE, "ignore_patterns=None if variant else VARIANTS", "ignore_patterns=VARIANTS",
     "test_hub.py::test_a_variant_is_downloaded_where_it_is_asked_for"),
    (LADDER, 'one["way"] == way(args)', "True", "test_benchmarks.py::test_a_rung_that_is_done_is_not_run_again"),
    (LADDER, "max(theirs, key=rate)", "min(theirs, key=rate)",
     "test_benchmarks.py::test_the_ladder_holds_its_last_rung_against_the_better_peer"),
    (LADDER, '"train.gamma": 5}', '"train.gamma": 4}', "test_benchmarks.py::test_the_ladder_ends_in_the_shipped_recipe"),
    (VERIFIERS, "(errors[: len(x_0)] - errors[len(x_0) :])", "(errors[len(x_0) :] - errors[: len(x_0)])",
     "test_verifiers.py::test_the_score_is_the_log_likelihood_ratio_of_a_gaussian_mixture"),
    (VERIFIERS, "* total / self.pairs", "/ self.pairs", "test_verifiers.py::test_a_pair_for_every_timestep_is_the_bounds_own_sum"),
    (VERIFIERS, "1 / (2 * variance * scheduler.snr(0, one))", "1 / (2 * variance)",
     "test_verifiers.py::test_the_decoders_term_is_the_difference_of_its_densities"),
    (VERIFIERS, "prompt[i : i + BATCH]", "prompt[:BATCH]", "test_verifiers.py::test_each_of_many_candidates_is_scored_by_its_own_prompt"),
    (VERIFIERS, ".clamp(min=0) for part", ".abs() for part",
     "test_measures.py::test_clip_scores_are_the_models_own_logits_whatever_the_batch"),
    (SEARCH, "[:, :n] + n * torch.arange(len(prompts))[:, None]", "[:, :n]", "test_search.py::test_paths_of_several_prompts_are_those_of_each"),
    (SEARCH, "scores.argsort(1, descending=True)", "scores.argsort(1)",
     "test_search.py::test_paths_go_where_the_verifier_points_and_copies_part_again"),
    (SEARCH, "each = sum(per_step) + verifier.calls", "each = sum(per_step)", "test_search.py::test_no_budget_is_overdrawn_and_every_call_is_counted"),
    (SERVING, 'raw = {"think": 1} | json.loads(', "raw = json.loads(", "test_serving.py::test_a_picture_of_before_the_search_is_read"),
    (SERVING, "think=1, seed=request.seed + i)", "think=1, seed=request.seed)",
     "test_serving.py::test_a_searched_picture_and_the_discarded_carry_what_draws_them_again"),
    (MEASURES, "((1, n), (HALVES, n // 2))", "((1, n // 2), (HALVES, n // 2))", "test_measures.py::test_kid_is_the_mean_discrepancy_pair_by_pair"),
    (MEASURES, "(HALVES, n // 2))", "(HALVES, n // 8))", "test_measures.py::test_the_error_of_kid_is_its_spread_over_data_sets"),
    (MEASURES, "with torch.random.fork_rng(devices=[]), warnings", "with warnings",
     "test_measures.py::test_kid_leaves_the_global_generator_alone"),
    (MEASURES, "x_0_hat, x_t, t, t - 1) / share.to(t.device)[t - 1])", "x_0_hat, x_t, t, t - 1) * (T - 1))",
     "test_measures.py::test_bound_sums_the_divergences_of_the_whole_chain_from_some_of_them"),
    (MEASURES, "1 + torch.searchsorted(", "2 + torch.searchsorted(",
     "test_measures.py::test_bound_sums_the_divergences_of_the_whole_chain_from_some_of_them"),
    (MEASURES, "split([len(part) for part, _ in seen])", "split([len(part) for part, _ in seen])[::-1]",
     "test_measures.py::test_errors_are_the_gaussian_denoisers_by_split_in_one_call_each"),
    (MEASURES, "(together - S) / (S * (S - 1))", "together / (S * S)", "test_measures.py::test_diversity_is_the_mean_distance_of_pairs"),
    (MEASURES, '"lossless": True, "quality"', '"lossless": False, "quality"',
     "test_measures.py::test_lossless_files_cannot_beat_noise_and_need_little_for_nothing"),
    (EVALUATION, 'kept(cache, "halves", name, bank.images, lambda: torch', '(lambda compute: compute())(lambda: torch',
     "test_evaluation.py::test_what_is_known_of_real_pictures_is_computed_once"),
    (EVALUATION, 'if known.get("model", "").startswith(model) else {}', "if True else {}",
     "test_evaluation.py::test_more_measures_the_same_drawings_by_more_and_names_every_network"),
    (SWEEP, "            pipe.unet = unets[point.weights]\n            images", "            images",
     "test_sweep.py::test_a_sweep_goes_on_where_it_stopped_and_shows_each_knob"),
    (SWEEP, "what + point.name", "what", "test_sweep.py::test_a_sweep_goes_on_where_it_stopped_and_shows_each_knob"),
]  # fmt: skip


def copy(folder: Path) -> Path:
    """The files that git knows, in a folder of their own."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def survives(folder: Path, *tests: str) -> bool:
    """Do the named tests stay green? RuntimeError where they could not even be collected."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{', '.join(tests)}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> int:
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy(Path(scratch))
        if not survives(folder, *sorted({m[3] for m in MUTANTS})):
            raise RuntimeError("a named test is red before anything is broken: run make test")
        for file, old, new, test in tqdm(MUTANTS, desc="mutants", unit="break"):
            whole = (folder / file).read_text()
            if whole.count(old) != 1:
                raise RuntimeError(f"{file} must hold this line once, found it {whole.count(old)} times: {old}")
            (folder / file).write_text(whole.replace(old, new))
            if survives(folder, test):
                survivors.append(f"{file}: {old.strip()} -> {new.strip()} is not noticed by {test}")
            (folder / file).write_text(whole)
    print("\n".join(survivors))
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} breaks turned their test red")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
