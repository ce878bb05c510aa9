import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Client } from "./client.js";
import { commands } from "./commands.js";
import { translate } from "./messages.js";
import { Panel } from "./panel.js";
import { selfTest } from "./selftest.js";
import { SETTINGS, refreshSeconds } from "./settings.js";
import { showErrors } from "./toasts.js";

const STYLE = new URL("./asyncdiff.css", import.meta.url).href;
const PANEL = {
  id: "AsyncDiff.TogglePanel",
  label: "Show or hide the AsyncDiff panel",
  icon: "pi pi-align-left",
  function: () => app.extensionManager.command.execute("Workspace.ToggleBottomPanelTab.asyncdiff"),
};
const replacing = commands(app);
const client = new Client(api, () => refreshSeconds(app.extensionManager.setting.get("AsyncDiff.Refresh")));
const copy = async (text) => navigator.clipboard.writeText(text);
const panel = new Panel({ client, copy });
const SELF_TEST = selfTest(app, client, copy);

app.registerExtension({
  name: "AsyncDiff",
  settings: SETTINGS,
  ...replacing,
  commands: [...replacing.commands, PANEL, SELF_TEST],
  menuCommands: [...replacing.menuCommands, { path: ["Extensions", "AsyncDiff"], commands: [PANEL.id, SELF_TEST.id] }],
  bottomPanelTabs: [
    {
      id: "asyncdiff",
      title: "AsyncDiff",
      type: "custom",
      render: (element) => panel.show(element),
      destroy: () => panel.hide(),
    },
  ],
  async setup() {
    const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: STYLE });
    document.head.append(link);
    showErrors(api, app);
    const texts = await api.getCustomNodesI18n();
    translate(texts[app.extensionManager.setting.get("Comfy.Locale")]?.asyncdiff);
  },
});
