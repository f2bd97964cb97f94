"""The papers, one file each (`minivlp.papers` lists them). What several share: `verbs` (what a model can be asked),
`pretraining` (losses as methods), `aligned` (two towers and ITC), `fusion_encoder` (with fusion layers on top)."""
