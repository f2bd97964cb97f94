"""Settings files of released models, read by one rule: every key is read, or listed here as harmless, or an error.

A key that nobody reads may change what the model computes, and then its weights would give wrong numbers without a
word. So `Section` remembers which keys were asked for, and `finish` refuses the rest, by name and value. What stands
in HARMLESS cannot change the outputs of a loaded model in evaluation mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from minivlp.layers.transformer import ACTIVATIONS
from minivlp.pretrained.keys import Size
from minivlp.weight_files import CheckpointError, UnsupportedModel

GIVE_CONFIG = "give `config=`, which takes the place of these settings"

HARMLESS = {
    "transformers": frozenset(
        # what the file is, and where it came from
        "architectures auto_map model_type _name_or_path name_or_path transformers_version _commit_hash torch_dtype "
        "dtype use_bfloat16 finetuning_task task_specific_params tokenizer_class prefix problem_type id2label label2id "
        "num_labels text_config_dict vision_config_dict _attn_implementation _attn_implementation_autoset "
        # of training alone
        "attention_dropout attention_probs_dropout_prob dropout hidden_dropout_prob classifier_dropout "
        "gradient_checkpointing initializer_factor initializer_range label_smoothing logit_scale_init_value "
        # of transformers' own code: caches, kernels, which outputs it returns
        "chunk_size_feed_forward output_attentions output_hidden_states pruned_heads return_dict torchscript "
        "tf_legacy_loss tie_encoder_decoder tie_word_embeddings use_cache use_return_dict "
        # texts come with their special tokens and a mask; the weights have no other ids
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
        # the shapes of the tensors tell these; or they belong to a layer that the family does not use
        "modality_type_vocab_size type_vocab_size num_images cross_attention_hidden_size projection_dim "
        "add_cross_attention is_decoder is_encoder_decoder "
        # of `generate`, whose arguments are ours
        "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
        "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
        "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p".split()
    ),
    "open_clip": frozenset(
        # of training alone, or how weights are initialized
        "patch_dropout pos_embed_type init_logit_scale cast_dtype output_dict "
        # of heads and towers that are refused where they are in use
        "attn_pooler_queries attn_pooler_heads timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop "
        "timm_drop_path hf_model_pretrained hf_proj_type hf_pooler_type proj pooler_type "
        # the shape of `logit_scale` tells it; and a LayerNorm of one token is the same before and after it is picked
        "nonscalar_logit_scale final_ln_after_pool "
        # whether further tokens are returned; the id of padding, which our masks leave out
        "output_tokens pad_id".split()
    ),
    "preprocessor": frozenset(
        "image_processor_type feature_extractor_type processor_class _valid_processor_keys auto_map "
        "data_format input_data_format return_tensors device disable_grouping default_to_square return_row_col_info "
        # read by transformers' own image processor, which we use
        "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std "
        "do_convert_rgb do_pad pad_size size_divisor use_square_size".split()
    ),
}
SAME_ACTIVATION = {  # transformers' further names of functions that we have
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


class Section:
    """One object of a settings file, whose keys are asked for one by one.

    where: the file and the place in it, for messages. given: what the file says. defaults: what the library that wrote
    it takes where the file says nothing, or null.
    """

    def __init__(self, where: str, given: Any, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{where} is {shown(given)}, not an object with settings: {GIVE_CONFIG}")
        self.where, self.given = where, given
        self.values = {**(defaults or {}), **{key: value for key, value in given.items() if value is not None}}
        self.known: set[str] = set()

    def __call__(self, key: str) -> Any:
        """The value of a key, or None. Raises nothing."""
        self.known.add(key)
        return self.values.get(key)

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error that a value is not what is `wanted`."""
        there = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return CheckpointError(
            f"{self.where}: {key!r} {there}; it has to be {wanted}. Correct the file, or {GIVE_CONFIG}"
        )

    def integer(self, key: str) -> int:
        """A whole number of at least 1."""
        value = self(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str) -> float:
        """A number above 0."""
        value = self(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def size(self, key: str) -> Size:
        """Height and width in pixels, from a number or a list of two."""
        value = self(key)
        pair = list(value) if isinstance(value, list | tuple) else [value, value]
        pair = pair * 2 if len(pair) == 1 else pair
        if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
            raise self.wrong(key, "a number of pixels, or height and width")
        return pair[0], pair[1]

    def image_and_patch_size(self) -> tuple[int | Size, int]:
        """`image_size` and `patch_size` as `ImageConfig` takes them. Patches that are not square are not supported."""
        image, patch = self.size("image_size"), self.size("patch_size")
        if patch[0] != patch[1]:
            raise UnsupportedModel(f"{self.where}: 'patch_size' is {list(patch)}; our patches are square")
        if image[0] % patch[0] or image[1] % patch[0]:
            raise UnsupportedModel(
                f"{self.where}: 'image_size' {list(image)} is no multiple of 'patch_size' {patch[0]}, as ours has to be"
            )
        return image[0] if image[0] == image[1] else image, patch[0]

    def only(self, key: str, *allowed: Any, why: str = "") -> None:
        """Raises UnsupportedModel where the file says anything else than the `allowed` values."""
        value = self(key)
        if value is not None and not any(value == fine and type(value) is type(fine) for fine in allowed):
            can = " or ".join(shown(value) for value in allowed) or "no such setting"
            raise UnsupportedModel(f"{self.where}: {key!r} is {shown(value)}; our model can express {can}{why}")

    def activation(self, key: str) -> str:
        """The name of an activation in `ACTIVATIONS`."""
        value = self(key)
        name = SAME_ACTIVATION.get(value, value) if isinstance(value, str) else None
        if name not in ACTIVATIONS:
            known = ", ".join([*ACTIVATIONS, *SAME_ACTIVATION])
            raise UnsupportedModel(f"{self.where}: {key!r} is {shown(value)}; we have the activations {known}")
        return name

    def finish(self, harmless: Iterable[str]) -> None:
        """Raises CheckpointError for keys of the file that were not asked for and are not `harmless`."""
        unknown = sorted(
            key for key, value in self.given.items() if value is not None and key not in self.known | set(harmless)
        )
        if unknown:
            listed = ", ".join(f"{key!r} ({shown(self.given[key])})" for key in unknown)
            raise CheckpointError(
                f"{self.where}: we do not know the setting{'s' * (len(unknown) > 1)} {listed}, which may change what "
                f"the model computes. If not, remove it from the file; or {GIVE_CONFIG}"
            )


def shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def transformers_sections(kind: str, settings: Mapping[str, Any], *parts: str) -> list[Section]:
    """The top of a transformers config.json and its `parts`, with the defaults of transformers' class `kind`.

    Raises CheckpointError for a config of another kind of model, and for values that transformers refuses.
    """
    import transformers

    where = "config.json"
    config_class = getattr(transformers, kind)
    told = settings.get("model_type", config_class.model_type)
    if told != config_class.model_type:
        raise CheckpointError(
            f"{where}: 'model_type' is {shown(told)}, not {shown(config_class.model_type)}. Is it a model of another "
            "family? Load it by that name"
        )
    given = {}
    for part in parts:  # older files have a second object for the same
        for key in (part, f"{part}_dict"):
            values = settings.get(key)
            given[part] = {**given.get(part, {}), **Section(f"{where}, {key}", {} if values is None else values).given}
    try:
        theirs = config_class.from_dict(dict(settings))
    except Exception as error:  # of their own classes, which change with their versions
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: transformers' {kind} refuses it ({reason}). Correct it, or {GIVE_CONFIG}"
        ) from None
    sections = [Section(where, {k: v for k, v in settings.items() if k not in parts})]
    sections += [Section(f"{where}, {part}", given[part]) for part in parts]
    for section, effective in zip(sections, (theirs, *(getattr(theirs, part) for part in parts)), strict=True):
        section.values |= effective.to_dict()  # which of two objects counts, transformers decides
    return sections
