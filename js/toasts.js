/** Errors of AsyncDiff as toasts: their messages name the input, its value, and what to do. */
export function showErrors(api, app) {
  api.addEventListener("execution_error", ({ detail }) => {
    if (!detail.exception_type?.startsWith("asyncdiff_nodes.")) return;
    app.extensionManager.toast.add({
      severity: "error",
      summary: "AsyncDiff",
      detail: detail.exception_message.trim(),
      life: 20000,
    });
  });
}
