"""Where the results live that the app opens: by the kind that a run.json names, a module and its class."""

HOMES = {
    "neuron map": ("workbench.analyses.neuron_map", "NeuronMap"),
    "transport": ("workbench.analyses.transport_scores", "TransportScores"),
    "linearity": ("workbench.analyses.linearity", "Linearity"),
    "shortcuts": ("workbench.analyses.shortcuts", "Shortcuts"),
    "lens_quality": ("workbench.analyses.lens_quality", "LensQuality"),
    "probe_sweep": ("probes.probe_sweep", "ProbeSweep"),
    "erasure": ("probes.erasing.erasure", "Erasure"),
    "scrubbing": ("probes.erasing.scrubbing", "Scrubbing"),
    "followed": ("probes.erasing.following", "Followed"),
    "top activations": ("workbench.analyses.top_activations", "TopActivations"),
    "map comparison": ("workbench.analyses.map_comparison", "MapComparison"),
    "backward_lens": ("workbench.analyses.backward_lens", "BackwardLens"),
    "lens": ("workbench.analyses.lens", "LensView"),
}
