import { t } from "./messages.js";

/**
 * The command that tries out the devices and shows the result.
 *
 * @param app the page's
 * @param client asks the server
 * @param copy puts a text on the clipboard
 * @returns the command, as app.registerExtension takes it
 */
export function selfTest(app, client, copy) {
  return {
    id: "AsyncDiff.SelfTest",
    label: "Self-test of the devices (two minutes)",
    icon: "pi pi-check-square",
    async function() {
      const toast = (severity, detail, life) => app.extensionManager.toast.add({ severity, summary: "AsyncDiff", detail, life });
      toast("info", t("testing"), 10000);
      const answer = await client.selfTest();
      if (answer?.text) show(answer.text, copy);
      else toast("warn", answer?.error ?? t("away"), 10000);
    },
  };
}

/** Show a text that can be copied. */
function show(text, copy) {
  const dialog = document.createElement("dialog");
  const shown = Object.assign(document.createElement("textarea"), { readOnly: true, value: text, ariaLabel: t("tested") });
  const button = (label, onclick) => Object.assign(document.createElement("button"), { type: "button", textContent: label, onclick });
  const copyButton = button(t("copyText"), async () => {
    shown.select(); // for the user's own Ctrl+C where the browser keeps the clipboard to itself
    copyButton.textContent = await copy(text).then(
      () => t("copiedText"),
      () => t("copySelected"),
    );
  });
  dialog.className = "asyncdiff-selftest";
  dialog.append(shown, copyButton, button(t("close"), () => dialog.close()));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
