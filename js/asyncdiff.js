import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Client } from "./client.js";
import { commands } from "./commands.js";
import { translate } from "./messages.js";
import { Panel } from "./panel.js";
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
const panel = new Panel({
  client: new Client(api, () => refreshSeconds(app.extensionManager.setting.get("AsyncDiff.Refresh"))),
  copy: (text) => navigator.clipboard.writeText(text),
});

app.registerExtension({
  name: "AsyncDiff",
  settings: SETTINGS,
  ...replacing,
  commands: [...replacing.commands, PANEL],
  menuCommands: [...replacing.menuCommands, { path: ["Extensions", "AsyncDiff"], commands: [PANEL.id] }],
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
