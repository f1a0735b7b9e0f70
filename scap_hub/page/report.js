"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = byId(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        // A page from a file may not write to the clipboard: the text is selected instead.
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  const layer = byId("layer");
  if (layer) {
    const show = () => {
      for (const portrait of document.querySelectorAll(".portrait")) {
        portrait.classList.toggle("closed", portrait.dataset.portrait !== layer.value);
      }
    };
    layer.addEventListener("change", show);
    show();
  }

  // The same words as those of the page's own numbers.
  const count = (value) => {
    for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= size) {
        const number = value / size;
        return `${number < 999.5 ? +number.toPrecision(3) : Math.round(number)} ${letter}`;
      }
    }
    return String(value);
  };
  const share = (value) => {
    const percent = 100 * value;
    return percent >= 1 ? `${percent.toFixed(1)} %` : `${+percent.toPrecision(2)} %`;
  };

  const slider = byId("target");
  if (!slider) return;
  const data = JSON.parse(byId("choices").textContent);
  const widths = document.querySelectorAll(".width");
  const bars = document.querySelectorAll("#groups rect.stays");
  const top = Math.max(...data.sizes);
  const choose = () => {
    const choice = data.choices[slider.value];
    const dense = data.choices[0];
    const set = (id, value, text) => { byId(id).textContent = text; byId(id).dataset.value = value; };
    byId("chosen").textContent = choice.target;
    byId("own").textContent = choice.target === data.own ? "as in this run" : "";
    slider.setAttribute("aria-valuetext", choice.target);
    set("macs", choice.macs, count(choice.macs));
    set("params", choice.params, count(choice.params));
    set("loss", choice.loss, share(choice.loss));
    byId("macs-share").textContent = share(choice.macs / dense.macs);
    byId("params-share").textContent = share(choice.params / dense.params);
    choice.widths.forEach((width, i) => {
      widths[i].textContent = width;
      const height = 150 * Math.sqrt(width / top);
      bars[i].setAttribute("y", 150 - height);
      bars[i].setAttribute("height", height);
    });
    const [x, y] = data.points[slider.value];
    byId("marker").setAttribute("cx", x);
    byId("marker").setAttribute("cy", y);
    const out = `${data.name}-${choice.target.replace("=", "-")}`;
    byId("command").textContent = data.command.replace("{TARGET}", choice.target).replace("{OUT}", out);
  };
  slider.addEventListener("input", choose);
  choose();
})();
