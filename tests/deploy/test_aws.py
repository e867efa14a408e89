"""The AWS templates: checked by AWS' linter and security rules, and created as stacks on a stand-in
of AWS.

The stand-in, moto, runs on loopback. It cannot create some types of resources from a template, but
through their API: alarms, secrets, the cache, scaling, the log's filter. The tests create those
through the API, with the computed properties of the template, so that the rules of the API check
them. moto does not have at all: the policy of the bucket of access logs, the e-mail subscription,
GitHub's OIDC provider, and references to secrets inside properties. docs/DEPLOYMENT.md says what is
left for a real account.
"""

import ast
import json
import re

import boto3
import pytest
import templates
import yaml
from conftest import ROOT, run, tool
from moto.server import ThreadedMotoServer
from templates import NAMES, REGION, Values

# Changes to a template for moto alone, each with its reason.
FOR_MOTO = {
    "data": [
        # moto returns an object instead of the group's name.
        ("      DBParameterGroupName: !Ref DatabaseParameters\n", ""),
        # There are no secrets here to export.
        (templates.text("data")[templates.text("data").index("\nOutputs:\n") :], "\n"),
    ],
}


@pytest.fixture(scope="module")
def aws():
    """Makes clients for a new, empty stand-in of AWS."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def client(service):
        return boto3.client(
            service, endpoint_url=f"http://{host}:{port}", region_name=REGION, aws_access_key_id="nobody", aws_secret_access_key="nothing"
        )

    yield client
    server.stop()


def make_stack(aws, name, template, **parameters):
    cloudformation = aws("cloudformation")
    given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
    cloudformation.create_stack(StackName=name, TemplateBody=template, Parameters=given, Capabilities=["CAPABILITY_IAM"])
    [stack] = cloudformation.describe_stacks(StackName=name)["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE", stack
    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}


def for_moto(name):
    template = templates.text(name)
    for old, new in FOR_MOTO.get(name, []):
        assert template.count(old) == 1, old
        template = template.replace(old, new)
    return template


def exports(aws):
    return {export["Name"]: export["Value"] for export in aws("cloudformation").list_exports()["Exports"]}


def make_secrets(aws):
    """Creates the secrets of data.yaml through their API; another stack exports their addresses."""
    manager, made = aws("secretsmanager"), {}
    values = Values(templates.load("data"), "prompt-data", exports(aws), {"Database.Endpoint.Port": "5432", "Cache.PrimaryEndPoint.Port": "6379"})
    secrets = templates.resources("data", "AWS::SecretsManager::Secret")
    # The generated ones first, because the others contain them.
    for name, secret in sorted(secrets.items(), key=lambda item: "SecretString" in item[1]["Properties"]):
        properties = values.of(secret["Properties"])
        if "GenerateSecretString" in properties:
            value = manager.get_random_password(**properties["GenerateSecretString"])["RandomPassword"]
        else:
            value = re.sub(
                r"\{\{resolve:secretsmanager:(\w+):SecretString\}\}",
                lambda found: manager.get_secret_value(SecretId=made[found[1]])["SecretString"], properties["SecretString"],
            )
        made[name] = manager.create_secret(
            Name=name, Description=properties["Description"], KmsKeyId=properties["KmsKeyId"], SecretString=value
        )["ARN"]
    outputs = {
        key: {"Value": made[output["Value"]["Ref"]], "Export": {"Name": f"prompt-data-{key}"}}
        for key, output in templates.load("data")["Outputs"].items()
    }
    stand_in = {"Resources": {"Topic": {"Type": "AWS::SNS::Topic", "Properties": {}}}, "Outputs": outputs}
    make_stack(aws, "exports-of-prompt-data", json.dumps(stand_in))
    return made


@pytest.fixture(scope="module")
def stacks(aws):
    """All four stacks, with default parameters; the outputs of each, and the secrets."""
    made = {"base": make_stack(aws, "prompt-base", for_moto("base"))}
    made["data"] = make_stack(aws, "prompt-data", for_moto("data"))
    made["secrets"] = make_secrets(aws)
    certificate = aws("acm").request_certificate(DomainName="prompts.example.com")["CertificateArn"]
    # moto keeps a parameter in an update only if it was set before, so all are set.
    given = {key: str(item["Default"]) for key, item in templates.load("service")["Parameters"].items() if "Default" in item}
    made["service"] = make_stack(
        aws, "prompt-service", for_moto("service"), **{**given, "ImageTag": "0123abc", "CertificateArn": certificate}
    )
    made["github"] = make_stack(aws, "prompt-github", for_moto("github"), Repository="someone/prompt-service")
    return made


def test_cfn_lint_finds_nothing():
    run(tool("cfn-lint"), "--regions", REGION, "--", *(f"deploy/aws/{name}.yaml" for name in NAMES))


def test_checkov_finds_nothing_but_what_is_suppressed_with_a_reason():
    checked = run(
        tool("checkov"), "--directory", "deploy/aws", "--framework", "cloudformation", "--output", "json", "--skip-download", "--quiet"
    )
    report = json.loads(checked.stdout)
    assert report["summary"]["failed"] == 0 and report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 80
    suppressed = []
    for name in NAMES:
        for resource in templates.load(name)["Resources"].values():
            suppressed += resource.get("Metadata", {}).get("checkov", {}).get("skip", [])
    assert all(len(item["comment"]) > 20 for item in suppressed)
    assert report["summary"]["skipped"] == len(suppressed), "each suppression still suppresses something"


@pytest.mark.parametrize("name", NAMES)
def test_the_template_has_no_aliases_which_aws_does_not_read(name):
    tokens = list(yaml.scan(templates.text(name)))
    assert not [token.value for token in tokens if isinstance(token, (yaml.AliasToken, yaml.AnchorToken))]


def test_no_secret_is_written_in_a_template():
    for name in NAMES:
        for key, parameter in templates.load(name)["Parameters"].items():
            assert not re.search(r"password|token", key, re.IGNORECASE), f"{key} would be typed in by somebody: {parameter}"


def test_the_stacks_are_made(stacks):
    assert stacks["service"]["Address"].endswith(".amazonaws.com")
    assert ":role/" in stacks["github"]["ReleaseRole"]


def test_tasks_and_data_are_in_private_networks_and_only_the_balancer_is_reached(aws, stacks):
    ec2 = aws("ec2")
    subnets = {kind: stacks["base"][f"{kind}Subnets"].split(",") for kind in ("Public", "Private", "Data")}

    # moto loses the association of tables that a template sets. So the test reads associations from
    # the template, and routes from the created resources.
    pairs = [item["Properties"] for item in templates.resources("base", "AWS::EC2::SubnetRouteTableAssociation").values()]
    table_of = {pair["SubnetId"]["Ref"]: pair["RouteTableId"]["Ref"] for pair in pairs}
    physical = {
        item["LogicalResourceId"]: item["PhysicalResourceId"]
        for item in aws("cloudformation").describe_stack_resources(StackName="prompt-base")["StackResources"] if "PhysicalResourceId" in item
    }

    def ways_out(subnet):
        [table] = ec2.describe_route_tables(RouteTableIds=[physical[table_of[subnet]]])["RouteTables"]
        routes = [route for route in table["Routes"] if "DestinationCidrBlock" in route]
        return {kind for route in routes for kind in ("GatewayId", "NatGatewayId") if route.get(kind, "local") != "local"}

    assert ways_out("PublicA") == ways_out("PublicB") == {"GatewayId"}
    assert ways_out("PrivateA") == ways_out("PrivateB") == {"NatGatewayId"}
    assert ways_out("DataA") == ways_out("DataB") == set()
    zones = {subnet["AvailabilityZone"] for subnet in ec2.describe_subnets(SubnetIds=subnets["Private"])["Subnets"]}
    assert len(zones) == 2

    def let_in(group):
        [found] = ec2.describe_security_groups(GroupIds=[stacks["base"][group]])["SecurityGroups"]
        return {
            (rule["FromPort"], source.get("GroupId") or source.get("CidrIp"))
            for rule in found["IpPermissions"] for source in [*rule["UserIdGroupPairs"], *rule["IpRanges"]]
        }

    assert let_in("BalancerGroup") == {(443, "0.0.0.0/0"), (80, "0.0.0.0/0")}
    assert let_in("TaskGroup") == {(8000, stacks["base"]["BalancerGroup"])}
    assert let_in("DatabaseGroup") == {(5432, stacks["base"]["TaskGroup"])}
    assert let_in("CacheGroup") == {(6379, stacks["base"]["TaskGroup"])}


def test_the_balancer_speaks_tls_redirects_and_keeps_sockets_open(aws, stacks):
    elb = aws("elbv2")
    [balancer] = elb.describe_load_balancers()["LoadBalancers"]
    assert balancer["Scheme"] == "internet-facing"
    listeners = {item["Port"]: item for item in elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])["Listeners"]}
    assert listeners[443]["Protocol"] == "HTTPS" and "TLS13" in listeners[443]["SslPolicy"]
    assert listeners[80]["DefaultActions"][0]["RedirectConfig"]["Protocol"] == "HTTPS"
    # moto drops the attributes of a template; its API accepts them.
    properties = templates.load("service")["Resources"]["Balancer"]["Properties"]
    attributes = Values(templates.load("service"), "prompt-service", exports(aws)).of(properties["LoadBalancerAttributes"])
    bucket = [name["Name"] for name in aws("s3").list_buckets()["Buckets"] if "accesslogs" in name["Name"]][0]
    for item in attributes:
        if item["Key"] == "access_logs.s3.bucket":
            item["Value"] = bucket
    set_now = elb.modify_load_balancer_attributes(LoadBalancerArn=balancer["LoadBalancerArn"], Attributes=attributes)["Attributes"]
    values = {item["Key"]: item["Value"] for item in set_now}
    # Sockets are pinged every 30 s.
    assert int(values["idle_timeout.timeout_seconds"]) > 2 * 30
    assert values["routing.http.xff_header_processing.mode"] == "append"
    [group] = elb.describe_target_groups()["TargetGroups"]
    assert (group["HealthCheckPath"], group["Port"], group["TargetType"]) == ("/healthz", 8000, "ip")


def test_the_task_runs_the_image_as_compose_does_with_its_secrets_and_time_to_stop(aws, stacks):
    ecs = aws("ecs")
    task = ecs.describe_task_definition(taskDefinition="prompt-service")["taskDefinition"]
    [container] = task["containerDefinitions"]
    assert container["image"] == f"{stacks['base']['RepositoryUri']}:0123abc"
    assert container["readonlyRootFilesystem"] is True and container["linuxParameters"]["capabilities"]["drop"] == ["ALL"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {container['user']}\n" in dockerfile
    assert container["healthCheck"]["command"] == ["CMD", "/prompt-service", "health"]
    # moto leaves a null where the template says AWS::NoValue.
    settings = {item["name"]: item["value"] for item in container["environment"] if item}
    assert set(settings) & {"SECRET_KEY", "DATABASE_URL", "REDIS_URL", "OPENAI_API_KEY"} == set()
    delay, grace = (int(settings[name].rstrip("s")) for name in ("SHUTDOWN_DELAY", "SHUTDOWN_GRACE"))
    assert delay + grace < container["stopTimeout"] <= 120
    secrets = {item["name"]: item["valueFrom"] for item in container["secrets"] if item}
    assert secrets == {
        "SECRET_KEY": stacks["secrets"]["SecretKey"], "SECRET_KEY_FALLBACKS": stacks["secrets"]["SecretKeyFallbacks"],
        "DATABASE_URL": stacks["secrets"]["DatabaseUrl"], "REDIS_URL": stacks["secrets"]["CacheUrl"],
    }
    # The proxy's networks: only they are trusted about the client's address.
    networks = [item["CidrBlock"] for item in aws("ec2").describe_subnets(SubnetIds=stacks["base"]["PublicSubnets"].split(","))["Subnets"]]
    assert sorted(settings["TRUSTED_PROXIES"].split(",")) == sorted(networks)


def test_the_service_rolls_back_by_itself_and_has_no_public_address(aws, stacks):
    ecs = aws("ecs")
    [service] = ecs.describe_services(cluster=stacks["service"]["Cluster"], services=[stacks["service"]["ServiceArn"]])["services"]
    assert service["status"] == "ACTIVE"
    # moto stores nothing else of it.
    properties = templates.load("service")["Resources"]["Service"]["Properties"]
    assert properties["LaunchType"] == "FARGATE"
    # Scaling decides the number of tasks, at least two. A number here would reset it at every
    # release.
    assert "DesiredCount" not in properties and templates.load("service")["Parameters"]["MinTasks"]["Default"] == 2
    assert properties["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert properties["NetworkConfiguration"]["AwsvpcConfiguration"]["AssignPublicIp"] == "DISABLED"


def test_the_secrets_make_addresses_that_a_service_can_read(aws, stacks):
    manager = aws("secretsmanager")
    value = {name: manager.get_secret_value(SecretId=arn)["SecretString"] for name, arn in stacks["secrets"].items()}
    assert re.fullmatch(r"postgres://prompt:[A-Za-z0-9]{48}@[^:@/]+:5432/prompt_service\?sslmode=require", value["DatabaseUrl"])
    assert re.fullmatch(r"rediss://:[A-Za-z0-9]{64}@[^:@/]+:6379/0", value["CacheUrl"])
    assert len(value["SecretKey"]) >= 32 and value["SecretKey"] != value["SecretKeyFallbacks"]


def test_the_database_is_encrypted_backed_up_and_protected(aws, stacks):
    assert "data" in stacks
    [database] = aws("rds").describe_db_instances()["DBInstances"]
    assert database["Engine"] == "postgres" and database["StorageEncrypted"] and not database["PubliclyAccessible"]
    assert database["BackupRetentionPeriod"] >= 7
    # moto reads these as false if they come from a parameter.
    properties = Values(templates.load("data"), "prompt-data", exports(aws)).of(templates.load("data")["Resources"]["Database"]["Properties"])
    assert properties["MultiAZ"] == "true" and properties["DeletionProtection"] == "true"
    assert database["DBSubnetGroup"]["VpcId"] == stacks["base"]["Vpc"]


def test_the_cache_is_created_through_its_api_with_tls_and_a_password(aws, stacks):
    cache = aws("elasticache")
    exported = exports(aws)
    token = aws("secretsmanager").get_secret_value(SecretId=stacks["secrets"]["CacheToken"])["SecretString"]
    values = Values(templates.load("data"), "prompt-data", exported)
    [(_, subnets)] = templates.resources("data", "AWS::ElastiCache::SubnetGroup").items()
    properties = values.of(subnets["Properties"])
    cache.create_cache_subnet_group(
        CacheSubnetGroupName="CacheSubnets", CacheSubnetGroupDescription=properties["Description"], SubnetIds=properties["SubnetIds"]
    )
    [(_, group)] = templates.resources("data", "AWS::ElastiCache::ReplicationGroup").items()
    properties = values.of(group["Properties"])
    assert properties["AuthToken"] == "{{resolve:secretsmanager:CacheToken:SecretString}}"
    cache.create_replication_group(ReplicationGroupId="prompt-cache", **{**properties, "AuthToken": token})
    [made] = cache.describe_replication_groups()["ReplicationGroups"]
    assert made["TransitEncryptionEnabled"] and made["AtRestEncryptionEnabled"] and made["AuthTokenEnabled"]
    # moto always creates one node.
    assert made["AutomaticFailover"] in ("enabled", "enabling") and properties["NumCacheClusters"] == 2


def test_every_alarm_is_accepted_and_notifies_the_topic(aws, stacks):
    cloudwatch, exported = aws("cloudwatch"), exports(aws)
    expected = 0
    for name in ("data", "service"):
        values = Values(templates.load(name), f"prompt-{name}", exported)
        for key, alarm in templates.resources(name, "AWS::CloudWatch::Alarm").items():
            cloudwatch.put_metric_alarm(AlarmName=key, **values.of(alarm["Properties"]))
            expected += 1
    alarms = cloudwatch.describe_alarms()["MetricAlarms"]
    assert len(alarms) == expected
    topics = {topic["TopicArn"] for topic in aws("sns").list_topics()["Topics"]}
    assert all(alarm["AlarmActions"] == [stacks["base"]["AlarmTopic"]] for alarm in alarms) and stacks["base"]["AlarmTopic"] in topics
    about = {alarm.get("MetricName") for alarm in alarms}
    assert about >= {
        "HTTPCode_ELB_5XX_Count", "TargetResponseTime", "UnHealthyHostCount", "CPUUtilization", "MemoryUtilization", "FreeStorageSpace",
        "DatabaseConnections", "DatabaseMemoryUsagePercentage",
    }
    runbook = (ROOT / "docs/OPERATIONS.md").read_text()
    assert [alarm["AlarmName"] for alarm in alarms if f"`{alarm['AlarmName']}`" not in runbook] == []


def test_scaling_follows_the_processor_and_the_requests(aws, stacks):
    scaling = aws("application-autoscaling")
    _, _, cluster_and_service = stacks["service"]["ServiceArn"].partition(":service/")
    cluster, _, service = cluster_and_service.partition("/")
    values = Values(templates.load("service"), "prompt-service", exports(aws), {"Cluster": cluster, "Service.Name": service})
    [(_, target)] = templates.resources("service", "AWS::ApplicationAutoScaling::ScalableTarget").items()
    properties = values.of(target["Properties"])
    scaling.register_scalable_target(**properties)
    which = {key: properties[key] for key in ("ServiceNamespace", "ScalableDimension", "ResourceId")}
    for policy in templates.resources("service", "AWS::ApplicationAutoScaling::ScalingPolicy").values():
        wanted = values.of(policy["Properties"])
        assert wanted.pop("ScalingTargetId") == "Scaling"
        scaling.put_scaling_policy(**which, **wanted)
    made = scaling.describe_scaling_policies(ServiceNamespace="ecs")["ScalingPolicies"]
    metrics = {
        item["TargetTrackingScalingPolicyConfiguration"]["PredefinedMetricSpecification"]["PredefinedMetricType"] for item in made
    }
    assert metrics == {"ECSServiceAverageCPUUtilization", "ALBRequestCountPerTarget"}


def test_logs_are_kept_encrypted_for_a_set_time_and_errors_in_them_are_counted(aws, stacks):
    logs = aws("logs")
    groups = {group["logGroupName"]: group for group in logs.describe_log_groups()["logGroups"]}
    for name in ("/prompt-service/service", "/prompt-base/network"):
        assert groups[name]["retentionInDays"] >= 365
    # moto drops the key of a template.
    for name in ("base", "service"):
        for group in templates.resources(name, "AWS::Logs::LogGroup").values():
            assert group["Properties"]["KmsKeyId"]
    values = Values(templates.load("service"), "prompt-service", {}, {"LogGroup": "/prompt-service/service"})

    def in_the_interfaces_case(value):
        if isinstance(value, list):
            return [in_the_interfaces_case(item) for item in value]
        if isinstance(value, dict):
            return {key[0].lower() + key[1:]: in_the_interfaces_case(item) for key, item in value.items()}
        return value

    for name, wanted in templates.resources("service", "AWS::Logs::MetricFilter").items():
        logs.put_metric_filter(filterName=name, **in_the_interfaces_case(values.of(wanted["Properties"])))
    made = logs.describe_metric_filters(logGroupName="/prompt-service/service")["metricFilters"]
    # In the form in which the service writes it.
    assert {item["filterName"]: item["filterPattern"] for item in made} == {
        "ErrorLines": '{ $.level = "ERROR" }', "RedisAwayLines": '{ $.message = "Redis is away*" }',
    }
    assert '"Redis is away' in (ROOT / "src/redis/mod.rs").read_text()


def test_the_settings_that_decide_about_money_and_privacy_are_parameters():
    template = templates.load("service")
    [container] = template["Resources"]["Task"]["Properties"]["ContainerDefinitions"]
    told = set(re.findall(r"'Name': '([A-Z_]+)'", str(container["Environment"])))
    assert {"UPSTREAM_DAILY_LIMIT", "OPENAI_BASE_URL", "SIMILAR_SCOPE", "PROMPT_THROTTLE", "CORS_ALLOWED_ORIGINS"} <= told


def test_images_are_scanned_encrypted_and_never_replaced(aws, stacks):
    [repository] = aws("ecr").describe_repositories()["repositories"]
    assert repository["repositoryUri"] == stacks["base"]["RepositoryUri"]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    # moto stores these two with the template's capital letters, or not at all.
    properties = templates.load("base")["Resources"]["Repository"]["Properties"]
    assert properties["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert properties["EncryptionConfiguration"]["EncryptionType"] == "KMS"


def policies(aws, role_arn):
    iam, role = aws("iam"), role_arn.rsplit("/", 1)[1]
    for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
        document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        # moto stores a template's policy in Python's notation.
        yield from (ast.literal_eval(document) if isinstance(document, str) else document)["Statement"]


def test_roles_may_do_only_what_they_need(aws, stacks):
    assert list(policies(aws, stacks["service"]["TaskRole"])) == [], "the program calls nothing of AWS"
    nowhere = {"ecr:GetAuthorizationToken", "ecs:DescribeTaskDefinition", "ecs:DeregisterTaskDefinition"}
    for role in (stacks["service"]["ExecutionRole"], stacks["github"]["ReleaseRole"], stacks["github"]["RolloutRole"]):
        for statement in policies(aws, role):
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert not [action for action in actions if "*" in action], statement
            if statement["Resource"] == "*":
                # By AWS' own list of actions these have no resource.
                assert set(actions) <= nowhere, statement
    readable = [s for s in policies(aws, stacks["service"]["ExecutionRole"]) if s["Action"] == "secretsmanager:GetSecretValue"]
    listed = {arn for arn in readable[0]["Resource"] if arn}
    assert listed == {stacks["secrets"][name] for name in ("SecretKey", "SecretKeyFallbacks", "DatabaseUrl", "CacheUrl")}


def test_only_the_workflows_environment_may_release(aws, stacks):
    role = aws("iam").get_role(RoleName=stacks["github"]["ReleaseRole"].rsplit("/", 1)[1])["Role"]
    [statement] = role["AssumeRolePolicyDocument"]["Statement"]
    wanted = statement["Condition"]["StringEquals"]
    assert wanted["token.actions.githubusercontent.com:sub"] == "repo:someone/prompt-service:environment:production"
    assert wanted["token.actions.githubusercontent.com:aud"] == "sts.amazonaws.com"
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert "production" in {job.get("environment") for job in workflow["jobs"].values()}


def test_a_new_image_is_rolled_out_by_an_update_that_changes_nothing_else(aws, stacks):
    cloudformation = aws("cloudformation")
    parameters = cloudformation.describe_stacks(StackName="prompt-service")["Stacks"][0]["Parameters"]
    kept = [{"ParameterKey": item["ParameterKey"], "UsePreviousValue": True} for item in parameters if item["ParameterKey"] != "ImageTag"]
    cloudformation.update_stack(
        StackName="prompt-service", UsePreviousTemplate=True, Capabilities=["CAPABILITY_IAM"],
        Parameters=[*kept, {"ParameterKey": "ImageTag", "ParameterValue": "4567def"}],
    )
    [stack] = cloudformation.describe_stacks(StackName="prompt-service")["Stacks"]
    assert stack["StackStatus"] == "UPDATE_COMPLETE"
    assert {"ParameterKey": "ImageTag", "ParameterValue": "4567def"} in stack["Parameters"]
    # A new revision for the new image. moto stores containers only when they are created, not when
    # they are changed.
    [definition] = aws("ecs").list_task_definitions(familyPrefix="prompt-service")["taskDefinitionArns"]
    assert definition.endswith("/prompt-service:2")
    [balancer] = aws("elbv2").describe_load_balancers()["LoadBalancers"]
    assert balancer["DNSName"] == stacks["service"]["Address"]
