import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { TO_ASYNCDIFF, TO_STOCK, replaceSamplers } from "../../js/replace.js";

// saved by two versions of the page: a root graph with a group, colours, reroutes, a loose end, linked widgets and a bypassed,
// collapsed and pinned node; one with a subgraph that has linked widgets; and the latter replaced, with options for two
const read = (name) => JSON.parse(readFileSync(new URL(`fixtures/${name}.json`, import.meta.url), "utf-8"));
const NODES = read("nodes-1.27.10");
const SUBGRAPH = read("subgraph-1.49.6");
const OPTIONS = read("options-1.49.6");

const there = (workflow, open, selected = []) => replaceSamplers(workflow, TO_ASYNCDIFF, open, selected);
const back = (workflow, open, selected = []) => replaceSamplers(workflow, TO_STOCK, open, selected);
const clone = (workflow) => JSON.parse(JSON.stringify(workflow));
const graphsOf = (workflow) => [workflow, ...(workflow.definitions?.subgraphs ?? [])];
const nodesOf = (workflow) => graphsOf(workflow).flatMap(({ nodes }) => nodes);
const samplersOf = (workflow) => nodesOf(workflow).filter(({ type }) => type in TO_ASYNCDIFF || type in TO_STOCK);
const typesOf = (workflow) => samplersOf(workflow).map(({ type }) => type);
const find = (workflow, type) => nodesOf(workflow).find((node) => node.type === type);

/** All ends of links at inputs, with the input's name in place of its number. */
function endsOf(workflow) {
  return graphsOf(workflow).flatMap((graph) =>
    [...graph.links, ...(graph.floatingLinks ?? [])].map((link) => {
      const [id, node, slot] = Array.isArray(link) ? [link[0], link[3], link[4]] : [link.id, link.target_id, link.target_slot];
      return [id, node, graph.nodes.find((other) => other.id === node)?.inputs[slot].name ?? `output ${slot}`];
    }),
  );
}

for (const [title, workflow] of Object.entries({ NODES, SUBGRAPH })) {
  test(`${title}: type, height, and the new input are all that changes`, () => {
    const before = clone(workflow);
    const { workflow: after, count } = there(workflow);
    assert.deepEqual(workflow, before, "the argument was changed");
    assert.equal(count, 3);
    assert.deepEqual(typesOf(after).toSorted(), ["AsyncDiffKSampler", "AsyncDiffKSampler", "AsyncDiffKSamplerAdvanced"]);

    assert.deepEqual(endsOf(after), endsOf(before));
    for (const node of samplersOf(after)) {
      const former = nodesOf(before).find(({ id }) => id === node.id);
      const names = node.inputs.map(({ name }) => name);
      assert.deepEqual(names.slice(3, 6), ["latent_image", "options", former.inputs[4].name]);
      assert.deepEqual(node.inputs.toSpliced(4, 1), former.inputs);
      assert.equal(node.size[1], former.size[1] + 20);
      Object.assign(node, { type: former.type, size: former.size, inputs: former.inputs });
    }
    assert.deepEqual(nodesOf(after), nodesOf(before));
    for (const graph of [...graphsOf(after), ...graphsOf(before)]) {
      for (const key of ["nodes", "links", "floatingLinks"]) delete graph[key];
    }
    assert.deepEqual(after, before);
  });

  test(`${title}: there and back is the same`, () => {
    const { workflow: after, count } = back(there(workflow).workflow);
    assert.equal(count, 3);
    assert.deepEqual(after, workflow);
  });
}

test("links to widgets move with their inputs", () => {
  const { workflow } = there(NODES);
  const sampler = find(workflow, "AsyncDiffKSampler");
  const seed = sampler.inputs.findIndex(({ name }) => name === "seed");
  assert.equal(seed, 5);
  assert.deepEqual(workflow.links.find(([id]) => id === sampler.inputs[seed].link).slice(3), [sampler.id, 5, "INT"]);
  const [loose] = workflow.floatingLinks;
  assert.equal(sampler.inputs[loose.target_slot].name, "cfg");
});

test("only the selected, whose ids may be numbers or strings", () => {
  const { id } = find(NODES, "KSamplerAdvanced");
  for (const selected of [[id], [String(id), find(NODES, "SaveImage").id]]) {
    const { workflow, count, bySelection } = there(NODES, undefined, selected);
    assert.deepEqual([count, bySelection], [1, true]);
    assert.deepEqual(typesOf(workflow).toSorted(), ["AsyncDiffKSamplerAdvanced", "KSampler", "KSampler"]);
  }
});

test("all, where no sampler is selected", () => {
  const { count, bySelection } = there(NODES, undefined, [find(NODES, "SaveImage").id]);
  assert.deepEqual([count, bySelection], [3, false]);
});

test("nothing, where the selected is replaced already", () => {
  const { id } = find(NODES, "KSamplerAdvanced");
  const once = there(NODES, undefined, [id]).workflow;
  const { workflow, count, bySelection } = there(once, undefined, [id]);
  assert.deepEqual([count, bySelection], [0, true]);
  assert.deepEqual(workflow, once);
  assert.equal(back(NODES).count, 0);
});

test("a selected subgraph stands for the samplers in it", () => {
  const [inner] = SUBGRAPH.definitions.subgraphs;
  const { workflow, count } = there(SUBGRAPH, undefined, [find(SUBGRAPH, inner.id).id]);
  assert.equal(count, 2);
  assert.equal(workflow.nodes.filter(({ type }) => type === "KSampler").length, 1);
});

test("in an open subgraph, those outside stay", () => {
  const [inner] = SUBGRAPH.definitions.subgraphs;
  const all = there(SUBGRAPH, inner.id).workflow;
  assert.deepEqual(typesOf(all).toSorted(), ["AsyncDiffKSampler", "AsyncDiffKSamplerAdvanced", "KSampler"]);
  const { id } = inner.nodes.find(({ type }) => type === "KSamplerAdvanced");
  const one = there(SUBGRAPH, inner.id, [id]).workflow;
  assert.deepEqual(typesOf(one).toSorted(), ["AsyncDiffKSamplerAdvanced", "KSampler", "KSampler"]);
});

test("a subgraph in a subgraph, used twice", () => {
  const nested = clone(SUBGRAPH);
  const [inner] = nested.definitions.subgraphs;
  const outer = { ...clone(inner), id: "outer", nodes: [1, 2].map((id) => ({ id, type: inner.id })), links: [] };
  nested.definitions.subgraphs.push(outer);
  find(nested, inner.id).type = "outer";
  assert.equal(there(nested).count, 3);
});

test("going back drops the links of options, and nothing else", () => {
  const options = find(OPTIONS, "AsyncDiffOptions");
  const ours = samplersOf(OPTIONS).map((node) => node.inputs.find(({ name }) => name === "options").link);
  const links = ours.filter((link) => link !== null);
  assert.equal(links.length, 2); // one from the Options node, one from the input of the subgraph

  const { workflow, count } = back(OPTIONS);
  assert.equal(count, 3);
  assert.deepEqual(
    endsOf(workflow),
    endsOf(OPTIONS).filter(([id, , name]) => !(links.includes(id) && name === "options")),
  );
  const left = find(workflow, "AsyncDiffOptions");
  assert.deepEqual(left.outputs[0].links, options.outputs[0].links.filter((id) => !links.includes(id)));
  assert.equal(left.outputs[0].links.length, 1); // to the node of the subgraph
  const [inner] = workflow.definitions.subgraphs;
  assert.deepEqual(inner.inputs.find(({ name }) => name === "options").linkIds, []);
  const stock = (node) => ({ ...node, order: null }); // the order of execution counts the Options node
  assert.deepEqual(samplersOf(workflow).map(stock), samplersOf(SUBGRAPH).map(stock));
});

test("a loose link to options goes, too", () => {
  const { workflow } = there(NODES);
  workflow.floatingLinks[0].target_slot = 4;
  assert.deepEqual(back(workflow).workflow.floatingLinks, []);
});

test("the pack of the node is named where a pack was named", () => {
  const workflow = clone(NODES);
  Object.assign(find(workflow, "KSamplerAdvanced").properties, { cnr_id: "comfy-core", ver: "0.3.64", mine: 1 });
  const after = there(workflow).workflow;
  assert.deepEqual(find(after, "AsyncDiffKSamplerAdvanced").properties, {
    "Node name for S&R": "KSamplerAdvanced",
    mine: 1,
    cnr_id: "comfyui-asyncdiff",
  });
  assert.deepEqual(find(after, "AsyncDiffKSampler").properties, { "Node name for S&R": "KSampler" });
  assert.equal(find(back(after).workflow, "KSamplerAdvanced").properties.cnr_id, "comfy-core");
});
