// Lists the models of this server.
fetch("/v1/models").then((response) => response.json()).then((answer) => {
  for (const model of answer.data) {
    const item = document.createElement("li");
    item.textContent = `${model.id}: step ${model.step}, ${model.params.toLocaleString()} parameters`;
    document.getElementById("models").append(item);
  }
});
