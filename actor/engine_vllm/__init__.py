"""The real engine. Nowhere else in the actor is there any vLLM.

In the actor's own process: `engine`, started by `arguments` with `refused_settings`, on GPUs with `update_room`. What
goes in: `prompts`, and for their images and videos `media`, `videos` and `foreign_tensors`. What comes out: `sampling`,
`outputs`, `beams` and `probes`. Weights: `updates`.

In vLLM's processes: `plugin`, which they load first, and `worker`, with `shadow`, `adapters` and `cpu_reload`, and
`suppression`. Between them and the actor: `groups` on the way there, `held_outputs` on the way back, and `cache_load`
for metrics.
"""
