import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import test from "node:test";

import { ENGLISH, t, translate } from "../../js/messages.js";

const LOCALES = new URL("../../locales/", import.meta.url);
const values = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();

for (const language of readdirSync(LOCALES).filter((name) => name !== "en")) {
  test(`${language} has every text of the panel, with the same values`, () => {
    const texts = JSON.parse(readFileSync(new URL(`${language}/main.json`, LOCALES), "utf8")).asyncdiff;
    assert.deepEqual(Object.keys(texts).sort(), Object.keys(ENGLISH).sort());
    for (const [key, text] of Object.entries(ENGLISH)) assert.deepEqual(values(texts[key]), values(text), key);
  });
}

test("texts are filled in, in the chosen language, or else in English", () => {
  assert.equal(t("step", { step: 3, steps: 20 }), "step 3 of 20");
  translate({ step: "Schritt {step} von {steps}" });
  assert.equal(t("step", { step: 3, steps: 20 }), "Schritt 3 von 20");
  assert.equal(t("stop"), "Stop workers");
  translate(undefined);
  assert.equal(t("step", { step: 3, steps: 20 }), "step 3 of 20");
});
