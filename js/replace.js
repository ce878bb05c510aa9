/** The stock samplers, and what stands in for them. */
export const TO_ASYNCDIFF = { KSampler: "AsyncDiffKSampler", KSamplerAdvanced: "AsyncDiffKSamplerAdvanced" };
/** The way back. */
export const TO_STOCK = Object.fromEntries(Object.entries(TO_ASYNCDIFF).map((pair) => pair.reverse()));

const OPTIONS = { name: "options", type: "ASYNCDIFF_OPTIONS", shape: 7, link: null }; // 7: the shape of an optional input
const ROW = 20; // the height of one input on the canvas

/**
 * Replace samplers in a workflow as the page saves it. What is not said here stays: ids, links, values, looks, and the name
 * that file names such as %KSampler.seed% refer to.
 *
 * @param workflow the root graph with the definitions of its subgraphs; it is not changed
 * @param types TO_ASYNCDIFF or TO_STOCK
 * @param open id of the subgraph that the user looks at; undefined: the root graph
 * @param selected ids of the nodes selected in it. Where no sampler is among them or in their subgraphs, all count.
 * @returns the changed workflow, how many nodes were changed, and whether the selection counted
 */
export function replaceSamplers(workflow, types, open, selected) {
  const changed = JSON.parse(JSON.stringify(workflow));
  const subgraphs = new Map((changed.definitions?.subgraphs ?? []).map((graph) => [graph.id, graph]));
  const graph = subgraphs.get(open) ?? changed;
  const chosen = samplers(graph, subgraphs, new Set(selected.map(String)));
  const found = [...(chosen.size ? chosen : samplers(graph, subgraphs))].filter(([node]) => node.type in types);
  for (const [node, owner] of found) replace(node, owner, types[node.type]);
  return { workflow: changed, count: found.length, bySelection: chosen.size > 0 };
}

/** The samplers among a graph's nodes, or those with `ids`, and in their subgraphs; each with the graph that it is in. */
function samplers(graph, subgraphs, ids) {
  const found = new Map();
  for (const node of graph.nodes) {
    if (ids && !ids.has(String(node.id))) continue;
    if (node.type in TO_ASYNCDIFF || node.type in TO_STOCK) found.set(node, graph);
    const inner = subgraphs.get(node.type);
    if (inner) for (const [sampler, owner] of samplers(inner, subgraphs)) found.set(sampler, owner);
  }
  return found;
}

function replace(node, graph, type) {
  const ours = type in TO_STOCK;
  node.type = type;
  node.size = [node.size[0], node.size[1] + (ours ? ROW : -ROW)];
  // the pack that the node is from; a version would be that of the former one
  const { cnr_id, aux_id, ver, ...properties } = node.properties;
  node.properties = cnr_id || aux_id ? { ...properties, cnr_id: ours ? "comfyui-asyncdiff" : "comfy-core" } : properties;

  // inputs with widgets come after all others, so the options come between latent_image and them
  const slot = node.inputs.findIndex(({ name }) => name === "latent_image") + 1;
  if (ours) node.inputs.splice(slot, 0, { ...OPTIONS });
  else disconnect(graph, node, node.inputs.splice(slot, 1)[0].link, slot);
  for (const link of linksInto(graph, node)) {
    const key = Array.isArray(link) ? 4 : "target_slot";
    if (link[key] >= slot) link[key] += ours ? 1 : -1;
  }
}

/** Links, complete or loose, that end at a node: arrays in the root graph, objects in subgraphs and where they are loose. */
function linksInto(graph, node) {
  const links = [...(graph.links ?? []), ...(graph.floatingLinks ?? [])];
  return links.filter((link) => String(link.target_id ?? link[3]) === String(node.id));
}

/** Take away what ends at a node's input; the page drops reroutes that carry nothing any more. */
function disconnect(graph, node, id, slot) {
  const ending = new Set(linksInto(graph, node).filter((link) => (link.target_slot ?? link[4]) === slot));
  for (const key of ["links", "floatingLinks"]) keep(graph, key, (link) => !ending.has(link));
  for (const output of graph.nodes.flatMap((origin) => origin.outputs ?? [])) keep(output, "links", (other) => other !== id);
  for (const input of graph.inputs ?? []) keep(input, "linkIds", (other) => other !== id);
}

function keep(owner, key, test) {
  if (owner[key]) owner[key] = owner[key].filter(test);
}
