// A field that searches the table of models; without a script the table is there as a whole.
const families = document.querySelector(".families");
if (families) {
  const plain = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");
  const rows = [...families.querySelectorAll("tbody tr")].map((row) => [plain(row.cells[0].textContent), row]);
  const field = Object.assign(document.createElement("input"), { type: "search", placeholder: "llama, Qwen3-8B, gpt2 …" });
  const said = document.createElement("p");
  field.setAttribute("aria-label", "Search the models");
  said.setAttribute("role", "status");
  const search = () => {
    const wanted = plain(field.value);
    const found = rows.filter(([name, row]) => !(row.hidden = !(name.includes(wanted) || wanted.includes(name))));
    said.textContent = found.length ? `${found.length} of ${rows.length}` : "None of these; hfblend.patch(model) tests it.";
  };
  field.addEventListener("input", search);
  families.before(field, said);
  search();
}
