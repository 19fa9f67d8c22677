// The panel of settings and request: a column where there is room for one, a sheet over the page where there is none.

const WIDE = matchMedia("(min-width: 62rem)");

/** Make the panel work. */
export function startPanel() {
  const panel = document.getElementById("panel");
  const toggle = document.getElementById("panel-toggle");
  const behind = [document.getElementById("bar"), document.getElementById("chat")];

  const show = (open) => {
    document.body.dataset.panel = open ? "open" : "closed";
    toggle.setAttribute("aria-expanded", String(open));
    for (const part of behind) part.inert = open && !WIDE.matches;
  };
  const close = () => {
    show(false);
    toggle.focus();
  };
  toggle.addEventListener("click", () => {
    const open = document.body.dataset.panel !== "open";
    show(open);
    if (open) panel.querySelector('[role="tab"][aria-selected="true"]').focus();
  });
  document.getElementById("panel-close").addEventListener("click", close);
  document.getElementById("shade").addEventListener("click", close);
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || WIDE.matches) return;
    event.stopPropagation();
    close();
  });
  WIDE.addEventListener("change", () => show(WIDE.matches));
  show(WIDE.matches);
  startTabs(panel);
  return { show, showsOver: () => !WIDE.matches && document.body.dataset.panel === "open" };
}

function startTabs(panel) {
  const tabs = [...panel.querySelectorAll('[role="tab"]')];
  const choose = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  }
}
