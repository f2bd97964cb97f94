"""The architectures of the models that write captions, for `designs`, which says how they are described."""

from __future__ import annotations

from minivlp.visualize.drawing.parts import CAPTION, Arrow, Box, Design, Frame, Picture, Tokens

BLIP = Design(
    "BLIP",
    "One text model used in three ways, one box per set of weights: only the decoder's self-attention is its own.",
    6.85,
    (
        Picture("patches", 0.5, 0.5, 1.1),
        Tokens("dec", "[DEC] a red heart", 2.5, 0.75),
        Tokens("enc", "[ENC] a red heart [SEP]", 4.3, 0.75),
        Tokens("cls", CAPTION, 6.57, 0.75),
        Box("image", "image encoder\nViT, 12 layers", 0.25, 1.95, 1.6, 0.6, "image"),
        Frame("text", "12 layers", 2.25, 1.65, 6.5, 2.75, "text"),
        Box("causal", "self-attention\ncausal", 2.45, 1.85, 1.7, 0.45, "causal"),
        Box("self", "self-attention\nbidirectional", 4.4, 1.85, 4.1, 0.45, "text"),
        Box("cross", "cross-attention", 2.45, 2.8, 3.85, 0.34, "both"),
        Box("ffn", "feed-forward", 2.45, 3.65, 6.05, 0.34, "text"),
        Box("lm", "LM: the next word", 2.4, 5.1, 1.8, 0.3, "loss"),
        Box("itm", "ITM: match?", 4.65, 5.1, 1.4, 0.3, "loss"),
        Box("itc", "ITC", 7.0, 5.1, 1.3, 0.3, "loss"),
        Box("momentum", "momentum model\nas in ALBEF", 7.35, 5.75, 1.5, 0.45, "momentum"),
    ),
    (
        Arrow("patches top", "image bottom", label="patches"),
        Arrow("dec top", "causal bottom"),
        Arrow("enc top", "self bottom"),
        Arrow("cls top", "self bottom"),
        Arrow("causal top", "cross bottom"),
        Arrow("self top .232", "cross bottom"),
        Arrow("self top .791", "ffn bottom", label="no image"),
        Arrow("cross top .221", "ffn bottom"),
        Arrow("cross top .753", "ffn bottom"),
        Arrow("image top", "cross left", label="all patches:\nkeys, values"),
        Arrow("ffn top", "lm bottom", label="every position"),
        Arrow("ffn top", "itm bottom", label="[ENC]"),
        Arrow("ffn top", "itc bottom", label="[CLS]"),
        Arrow("image top .2", "itc top .15", label="class token, projected", through=((0.57, 5.95), (7.195, 5.95))),
        Arrow("itc left", "itm right", "negatives", "hard negatives"),
        Arrow("momentum bottom", "itc top", "momentum", "pseudo-targets"),
    ),
)

COCA = Design(
    "CoCa",
    "One pass for two losses: the lower half of the text decoder sees no image, the upper half does, and writes.",
    6.0,
    (
        Picture("patches", 0.9, 0.45, 1.1),
        Tokens("caption", "[DEC] a red heart [SEP] [CLS]", 5.91, 0.75),
        Box("image", "image encoder\nViT without class token", 0.45, 1.95, 2.0, 0.5, "image"),
        Box("pooler", "attentional pooler\n256 queries", 0.45, 3.5, 2.0, 0.55, "head"),
        Box("summary", "attentional pooler\n1 query", 2.7, 2.2, 1.5, 0.5, "head"),
        Box("unimodal", "unimodal half\n12 layers: causal self-attention,\nfeed-forward", 5.9, 1.9, 2.6, 0.75, "text"),
        Box(
            "multimodal",
            "multimodal half\n12 layers: causal self-attention,\ncross-attention, feed-forward",
            5.9,
            3.5,
            2.6,
            0.75,
            "both",
        ),
        Box("itc", "ITC", 4.55, 2.3, 0.75, 0.3, "loss"),
        Box("lm", "LM: the next word", 6.3, 4.95, 1.8, 0.3, "loss"),
    ),
    (
        Arrow("patches top", "image bottom", label="patches"),
        Arrow("caption top", "unimodal bottom", label="tokens, [CLS] last"),
        Arrow("image top", "pooler bottom", label="all patches"),
        Arrow("pooler right .8", "multimodal left", label="256 tokens: keys, values"),
        Arrow("pooler right .25", "summary top"),
        Arrow("summary right", "itc left"),
        Arrow("unimodal left", "itc right", label="[CLS]"),
        Arrow("unimodal top", "multimodal bottom", label="text tokens, without [CLS]"),
        Arrow("multimodal top", "lm bottom", label="every position"),
    ),
)

GIT = Design(
    "GIT",
    "One decoder reads the image as the beginning of the text. No cross-attention, no other head, one loss.",
    6.0,
    (
        Picture("patches", 1.25, 0.45, 1.1),
        Tokens("caption", CAPTION, 5.97, 0.75),
        Box("image", "image encoder\nCLIP's ViT, 12 layers", 0.8, 1.95, 2.0, 0.5, "image"),
        Box("project", "projection\nLayerNorm", 1.15, 3.0, 1.3, 0.45, "head"),
        Box("words", "word embedding\n+ position, LayerNorm", 6.1, 2.35, 1.8, 0.5, "text"),
        Box(
            "decoder",
            "decoder\n6 layers: self-attention, feed-forward, LayerNorm behind each\n"
            "image tokens attend to the image, text tokens to the image and to earlier text",
            0.8,
            3.85,
            7.4,
            0.75,
            "both",
        ),
        Box("lm", "LM: the next word", 6.1, 4.95, 1.8, 0.3, "loss"),
    ),
    (
        Arrow("patches top", "image bottom", label="patches"),
        Arrow("caption top", "words bottom", label="tokens"),
        Arrow("image top", "project bottom", label="class token and all patches"),
        Arrow("project top", "decoder bottom", label="in front of the text"),
        Arrow("words top", "decoder bottom"),
        Arrow("decoder top", "lm bottom", label="every text position"),
    ),
)
