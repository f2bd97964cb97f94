"""What the released models call the parts of a layer, beside our names for them: the tables of `minivlp.pretrained`."""

from minivlp.pretrained import parts

# without their queries, keys and values, which one matrix of ours stacks
BERT_LAYER = {theirs: ours for theirs, ours in parts.BERT_LAYER if isinstance(theirs, str)}
VIT_LAYER = dict(parts.VIT_LAYER)
