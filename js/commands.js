import { t } from "./messages.js";
import { TO_ASYNCDIFF, TO_STOCK, replaceSamplers } from "./replace.js";

const ICON = "pi pi-arrow-right-arrow-left";
const REPLACE = {
  id: "AsyncDiff.ReplaceKSamplers",
  label: "Replace KSampler by AsyncDiff",
  types: TO_ASYNCDIFF,
  none: "noStock",
  otherwise: "otherSamplers",
};
const RESTORE = {
  id: "AsyncDiff.RestoreKSamplers",
  label: "Replace AsyncDiff by KSampler",
  types: TO_STOCK,
  none: "noOurs",
  otherwise: "otherModel",
};
const ACTIONS = [REPLACE, RESTORE];

/**
 * The commands that exchange samplers, for the menu, the context menu of a node and the toolbox of a selection.
 *
 * @param app the page's
 * @returns a part of what app.registerExtension takes
 */
export function commands(app) {
  return {
    commands: ACTIONS.map((action) => ({
      id: action.id,
      label: action.label,
      icon: ICON,
      function: () => run(app, action, [...app.canvas.selectedItems]),
    })),
    menuCommands: [{ path: ["Extensions", "AsyncDiff"], commands: ACTIONS.map(({ id }) => id) }],
    getNodeMenuItems(node) {
      const { selectedItems } = app.canvas;
      const callback = (action) => () => run(app, action, selectedItems.has(node) ? [...selectedItems] : [node]);
      return actionsFor(node).map((action) => ({ content: action.label, callback: callback(action) }));
    },
    getSelectionToolboxCommands: (item) => actionsFor(item).map(({ id }) => id),
  };
}

function actionsFor(item) {
  return ACTIONS.filter(({ types }) => item.type in types);
}

async function run(app, action, items) {
  const { canvas } = app;
  const ids = items.filter((item) => canvas.graph.getNodeById(item.id) === item).map(({ id }) => id);
  const { changeTracker } = app.extensionManager.workflow.activeWorkflow;
  // the end of a change is when the tracker looks at the graph
  changeTracker.beforeChange();
  changeTracker.afterChange();
  const { workflow, count, bySelection } = replaceSamplers(changeTracker.activeState, action.types, canvas.subgraph?.id, ids);
  if (!count) {
    const where = t(bySelection ? "inSelection" : "inGraph");
    return toast(app, "warn", t(action.none, { where, cure: t(bySelection ? "selectOthers" : action.otherwise) }));
  }
  // as if the user had undone the replacement before: the page's own way to show another state and to keep the former one
  changeTracker.redoQueue.length = 0;
  changeTracker.redoQueue.push(workflow);
  await changeTracker.redo();
  changeTracker.activeState = JSON.parse(JSON.stringify(canvas.graph.rootGraph.serialize()));
  canvas.selectItems(ids.map((id) => canvas.graph.getNodeById(id)));
  toast(app, "success", t(count === 1 ? "replacedOne" : "replaced", { count }));
}

function toast(app, severity, detail) {
  app.extensionManager.toast.add({ severity, summary: "AsyncDiff", detail, life: severity === "warn" ? 10000 : 5000 });
}
