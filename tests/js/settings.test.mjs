import assert from "node:assert/strict";
import test from "node:test";

import { refreshSeconds } from "../../js/settings.js";

test("whatever is stored, the server is asked for an interval that it takes", () => {
  const found = [0.5, 0, 0.01, 100, null, undefined, "x", "2", NaN].map(refreshSeconds);
  assert.deepEqual(found, [0.5, 0.25, 0.1, 5, 0.25, 0.25, 0.25, 2, 0.25]);
});
