"use strict";
(() => {
  const all = (query, root = document) => Array.from(root.querySelectorAll(query));
  const root = document.documentElement;

  // Theme: the reader's choice, else the system's. A page opened from a file may have no storage.
  const button = document.querySelector("button.theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => {
    button.setAttribute("aria-pressed", String(dark()));
    button.textContent = dark() ? "Light page" : "Dark page";
  };
  try { const kept = localStorage.getItem("vlaquant-theme"); if (kept) root.dataset.theme = kept; } catch (error) { /* none */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("vlaquant-theme", root.dataset.theme); } catch (error) { /* none */ }
    show();
  });
  show();

  // What the pointer is over
  const tip = document.getElementById("tip");
  const rows = JSON.parse(document.getElementById("outlier-layers")?.textContent || "[]");
  const words = (event) => {
    const map = event.target.closest("[data-map]");
    if (map) {
      const box = map.getBoundingClientRect();
      const row = rows[Math.min(rows.length - 1, Math.floor((event.clientX - box.left) / box.width * rows.length))];
      return row && `${row[0]}: ${row[1]} channels, largest over average ${row[2]}× before, ${row[3]}× after`;
    }
    const owner = event.target.closest("svg *")?.closest(":has(> title), [data-tip]");
    if (!owner) return null;
    const title = owner.querySelector(":scope > title");
    if (title) { owner.dataset.tip = title.textContent; title.remove(); } // so that the browser shows no second one
    return owner.dataset.tip;
  };
  document.addEventListener("pointermove", (event) => {
    const told = event.target.closest ? words(event) : null;
    tip.hidden = !told;
    if (!told) return;
    tip.textContent = told;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${event.clientY + 16 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16}px`;
  });

  // The table of all layers: search, choose, sort
  const table = document.querySelector("table.plan");
  if (table) {
    const body = table.tBodies[0];
    const lines = Array.from(body.rows).map((row) => ({
      row,
      text: row.textContent.toLowerCase(),
      part: row.dataset.part,
      stored: row.dataset.stored,
      keys: Array.from(row.cells).map((cell) => cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key)),
    }));
    const search = document.getElementById("search");
    const part = document.getElementById("part");
    const stored = document.getElementById("stored");
    const count = document.getElementById("count");
    const filter = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const one of lines) {
        const fits = wanted.every((word) => one.text.includes(word))
          && (!part.value || one.part === part.value) && (!stored.value || one.stored === stored.value);
        one.row.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${lines.length} layers`;
    };
    search.addEventListener("input", filter);
    part.addEventListener("change", filter);
    stored.addEventListener("change", filter);
    all("thead th", table).forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      lines.sort((a, b) => {
        const [x, y] = [a.keys[column], b.keys[column]];
        if (typeof x === "number" || typeof y === "number") {
          const [known, other] = [typeof x === "number", typeof y === "number"]; // what has no number comes last
          return known && other ? sign * (x - y) : known ? -1 : 1;
        }
        return sign * x.localeCompare(y, undefined, { numeric: true });
      });
      body.append(...lines.map((one) => one.row));
    }));
    // A layer in the drawing leads to its row
    document.addEventListener("click", (event) => {
      const layer = event.target.closest?.("[data-layer]");
      if (!layer) return;
      search.value = part.value = stored.value = "";
      filter();
      all("tr.found", body).forEach((row) => row.classList.remove("found"));
      const row = document.getElementById(`layer-${layer.dataset.layer}`);
      row.classList.add("found");
      row.scrollIntoView({ block: "center" });
    });
    document.querySelector(".filters").hidden = false;
    filter();
  }

  // On paper everything is open
  addEventListener("beforeprint", () => all("details").forEach((one) => { one.dataset.was = one.open ? "1" : ""; one.open = true; }));
  addEventListener("afterprint", () => all("details").forEach((one) => { one.open = Boolean(one.dataset.was); }));
})();
