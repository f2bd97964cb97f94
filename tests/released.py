"""What the released models call the parts of a layer, beside our names for them."""

BERT_LAYER = {  # with its queries, keys and values apart, which one matrix of ours stacks
    "attention.output.dense": "self_attention.out",
    "attention.output.LayerNorm": "self_norm",
    "crossattention.self.query": "cross_attention.q",
    "crossattention.output.dense": "cross_attention.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_norm",
}
VIT_LAYER = {
    "attn.qkv": "self_attention.qkv",
    "attn.proj": "self_attention.out",
    "norm1": "self_norm",
    "norm2": "feed_norm",
    "mlp.fc1": "feed_forward.up",
    "mlp.fc2": "feed_forward.down",
}
