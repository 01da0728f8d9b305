"""Repeats the tests of the recorded arrays against diffusers on fresh random weights (see the fixture `golden`)."""

# ruff: noqa: F401
from test_controlnet import (
    folder,
    test_outputs_in_diffusers_order_equal_the_reference,
    test_outputs_in_the_trained_order_equal_the_reference,
)
from test_guided import (
    test_a_call_with_diffusers_names_equals_the_reference,
    test_every_step_from_an_image_equals_the_reference,
    test_every_step_of_inpainting_equals_the_reference,
)
from test_pipeline import (
    test_every_step_of_a_run_equals_the_reference,
    test_running_two_prompts_at_once_equals_two_runs,
    test_the_image_of_a_run_equals_the_reference,
)
from test_text_encoder import (
    test_embedding_rows_equal_the_reference,
    test_every_layer_equals_the_reference,
    test_near_zero_prompt_embeddings_equal_the_reference,
    test_prompt_embeddings_equal_the_reference,
)
from test_tokenizer import test_ids_equal_the_reference
from test_transformer import (
    test_every_part_equals_the_reference,
    test_modulations_equal_the_reference,
    test_outputs_equal_the_reference,
    test_outputs_for_near_zero_activations_equal_the_reference,
    test_outputs_of_a_model_wider_than_the_time_embedding_equal_the_reference,
    test_positions_equal_the_reference,
    test_rotary_tables_equal_the_reference,
)
from test_vae import (
    test_decoded_pixels_equal_the_reference,
    test_each_part_of_the_decoder_equals_the_reference,
    test_encoded_moments_and_latents_equal_the_reference,
    test_near_zero_activations_decode_as_in_the_reference,
    test_near_zero_activations_encode_as_in_the_reference,
)
